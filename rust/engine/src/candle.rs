//! [`Device`] over candle tensors, f32 throughout: the readable reference of the other devices. Plain operations only,
//! which round as the gemm below them does: unlike the CPU device's, a row's last bits may depend on its company.

use candle_core::{D, DType, Device as Place, Tensor};
use hfcore_kernels::elementwise::{Activation, Pairing, SWISH_ALPHA, SWISH_LIMIT};
use hfcore_kernels::pool::Pool;
use hfcore_kernels::quant::dequantize;

use crate::arch::Rope;
use crate::batch::{Batch, PAGE, Span};
use crate::conversion::Conversion;
use crate::device::{Angles, AttentionLayer, AttentionShape, Convolution, Device, HeadNorms, Norm};
use crate::error::{Error, Result};
use crate::weights;

/// A place that candle computes on. Clones share it: weights and decoder must be on clones of one.
#[derive(Clone)]
pub struct Candle {
    device: Place,
    step: Step,
}

/// What all layers of a step share.
#[derive(Clone, Default)]
struct Step {
    rotations: Vec<Rotation>,
    /// Where each row's keys and values go, `[rows, 1]`.
    slots: Option<Tensor>,
    /// The spans' views for all that layers have seen so far.
    views: Vec<(Sees, Vec<View>)>,
}

/// A window, and whether queries see both ways.
type Sees = (Option<usize>, bool);

/// One rope's angles.
#[derive(Clone)]
struct Rotation {
    /// `[rows, 1, angles]`
    cos: Tensor,
    sin: Tensor,
    /// Multiplies queries, `[rows, 1, 1]`.
    queries: Option<Tensor>,
}

/// What the rows of one span see.
#[derive(Clone)]
struct View {
    first_row: usize,
    rows: usize,
    /// The positions of its first row and of the first that any row sees.
    start: usize,
    from: usize,
    /// Slots of the `n` positions that any row sees, ascending by position.
    slots: Tensor,
    /// `[rows, n]`: 0 where a row sees a position, else minus infinity. `None`: a single row, which sees all.
    mask: Option<Tensor>,
}

/// `[outputs, inputs]`, and the bias.
pub struct Matrix {
    weight: Tensor,
    bias: Option<Tensor>,
}

/// Rows of f32; nothing before it is first written.
#[derive(Default)]
pub struct Buffer(Option<Tensor>);

/// One layer's keys and values, `[pages * PAGE, kv_heads * head_dim]` each. A slot is a row of them.
pub struct KvLayer {
    keys: Tensor,
    values: Tensor,
}

impl Candle {
    /// On the CPU, with candle's own threads.
    pub fn cpu() -> Self {
        Self {
            device: Place::Cpu,
            step: Step::default(),
        }
    }
}

impl Matrix {
    /// `x weight^T + bias`
    fn times(&self, x: &Tensor) -> candle_core::Result<Tensor> {
        let y = x.matmul(&self.weight.t()?)?;
        match &self.bias {
            Some(bias) => y.broadcast_add(bias),
            None => Ok(y),
        }
    }
}

impl Buffer {
    fn get(&self) -> candle_core::Result<&Tensor> {
        match &self.0 {
            Some(tensor) => Ok(tensor),
            None => candle_core::bail!("a buffer was read before it was written"),
        }
    }

    /// Keep these rows alone.
    fn keep(&mut self, operation: &str, rows: &[u32]) -> Result<()> {
        let chosen = |x: &Tensor| x.index_select(&Tensor::new(rows, x.device())?, 0);
        let chosen = self.get().and_then(chosen);
        self.set(operation, chosen)
    }

    /// Keep what an operation gave.
    fn set(&mut self, operation: &str, value: candle_core::Result<Tensor>) -> Result<()> {
        self.0 = Some(value.map_err(failed(operation))?);
        Ok(())
    }
}

/// The engine's error for a failure inside candle.
fn failed(operation: &str) -> impl FnOnce(candle_core::Error) -> Error {
    move |error| Error::Internal(format!("candle, {operation}: {error}"))
}

impl Device for Candle {
    type Matrix = Matrix;
    type Vector = Tensor;
    type Buffer = Buffer;
    type Cache = Vec<KvLayer>;

    fn matrix(&self, parts: &[weights::Tensor], bias: Option<&[f32]>) -> Result<Matrix> {
        let mut values = Vec::new();
        for part in parts {
            values.extend(match (part.target, part.ready) {
                (Some(target), Some(ready)) => {
                    let mut numbers = vec![0.0; part.elements()];
                    dequantize(target.tensor_type, ready.blocks(), &mut numbers);
                    numbers
                }
                (Some(target), None) => Conversion::new(&Pool::new(1), *part, target)?.numbers(),
                (None, _) => part.dequantize(),
            });
        }
        let cols = parts.first().map_or(0, |part| part.cols());
        let rows = parts.iter().map(|part| part.rows()).sum::<usize>();
        let weight = Tensor::from_vec(values, (rows, cols), &self.device);
        let bias = bias.map(|bias| Tensor::new(bias, &self.device)).transpose();
        Ok(Matrix {
            weight: weight.map_err(failed("matrix"))?,
            bias: bias.map_err(failed("bias"))?,
        })
    }

    fn vector(&self, values: Vec<f32>) -> Result<Tensor> {
        Tensor::new(values, &self.device).map_err(failed("vector"))
    }

    fn cache(&self, pages: usize, shapes: &[AttentionShape]) -> Result<Vec<KvLayer>> {
        let layer = |shape: &AttentionShape| {
            let size = (pages * PAGE, shape.kv_heads * shape.head_dim);
            let keys = Tensor::zeros(size, DType::F32, &self.device)?;
            let values = Tensor::zeros(size, DType::F32, &self.device)?;
            Ok(KvLayer { keys, values })
        };
        let layers = shapes.iter().map(layer).collect::<candle_core::Result<_>>();
        layers.map_err(failed("cache"))
    }

    fn begin(&mut self, batch: &Batch, ropes: &[Rope]) -> Result<()> {
        self.step = Step::new(batch, ropes, &self.device).map_err(failed("begin"))?;
        Ok(())
    }

    fn upload(&mut self, values: &[f32], width: usize, out: &mut Buffer) -> Result<()> {
        let shape = (values.len() / width, width);
        out.set("upload", Tensor::from_slice(values, shape, &self.device))
    }

    fn norm(
        &mut self,
        x: &Buffer,
        by: &Norm<Tensor>,
        _next: Option<&Self::Matrix>,
        out: &mut Buffer,
    ) -> Result<()> {
        let normed = x.get().and_then(|x| {
            let y = normalise(x, &by.weight, by.eps, by.centred)?;
            match &by.bias {
                Some(bias) => y.broadcast_add(bias),
                None => Ok(y),
            }
        });
        out.set("norm", normed)
    }

    fn linear(&mut self, matrix: &Matrix, x: &Buffer, out: &mut Buffer) -> Result<()> {
        out.set("linear", x.get().and_then(|x| matrix.times(x)))
    }

    fn linear_add(&mut self, matrix: &Matrix, x: &Buffer, out: &mut Buffer) -> Result<()> {
        let product = x.get().and_then(|x| matrix.times(x));
        let sum = product.and_then(|y| out.get()? + y);
        out.set("linear_add", sum)
    }

    fn gated(
        &mut self,
        activation: Activation,
        matrix: &Matrix,
        x: &Buffer,
        out: &mut Buffer,
    ) -> Result<()> {
        let product = x.get().and_then(|x| matrix.times(x));
        out.set("gated", product.and_then(|both| gate(activation, &both)))
    }

    fn activated(
        &mut self,
        activation: Activation,
        matrix: &Matrix,
        x: &Buffer,
        out: &mut Buffer,
    ) -> Result<()> {
        let product = x.get().and_then(|x| matrix.times(x));
        out.set("activated", product.and_then(|y| activate(activation, &y)))
    }

    fn activate(
        &mut self,
        activation: Activation,
        gated: bool,
        x: &Buffer,
        out: &mut Buffer,
    ) -> Result<()> {
        let product = x.get().and_then(|x| match gated {
            true => gate(activation, x),
            false => activate(activation, x),
        });
        out.set("activate", product)
    }

    fn attention(
        &mut self,
        layer: usize,
        spec: &AttentionLayer<Tensor>,
        batch: &Batch,
        qkv: &mut Buffer,
        cache: &mut Vec<KvLayer>,
        outputs_only: bool,
        out: &mut Buffer,
    ) -> Result<()> {
        let Some(cache) = cache.get(layer) else {
            let layers = cache.len();
            return Err(Error::Internal(format!(
                "layer {layer} in a cache of {layers}"
            )));
        };
        let attended = qkv
            .get()
            .and_then(|qkv| self.attend(spec, batch, qkv, cache));
        out.set("attention", attended)?;
        match outputs_only {
            true => out.keep("attention", &batch.outputs),
            false => Ok(()),
        }
    }

    fn convolve(
        &mut self,
        layer: usize,
        spec: &Convolution<Tensor>,
        batch: &Batch,
        x: &Buffer,
        cache: &mut Vec<KvLayer>,
        outputs_only: bool,
        out: &mut Buffer,
    ) -> Result<()> {
        let Some(cache) = cache.get(layer) else {
            let layers = cache.len();
            return Err(Error::Internal(format!(
                "layer {layer} in a cache of {layers}"
            )));
        };
        let convolved = x.get().and_then(|x| self.short(spec, batch, x, cache));
        out.set("convolve", convolved)?;
        match outputs_only {
            true => out.keep("convolve", &batch.outputs),
            false => Ok(()),
        }
    }

    fn clamp(&mut self, x: &mut Buffer, limit: f32) -> Result<()> {
        let clamped = x.get().and_then(|x| x.clamp(-limit, limit));
        x.set("clamp", clamped)
    }

    fn columns(&mut self, x: &Buffer, from: usize, width: usize, out: &mut Buffer) -> Result<()> {
        let chosen = |x: &Tensor| x.narrow(1, from, width)?.contiguous();
        out.set("columns", x.get().and_then(chosen))
    }

    fn join(&mut self, parts: &[&Buffer], out: &mut Buffer) -> Result<()> {
        let parts: candle_core::Result<Vec<_>> = parts.iter().map(|part| part.get()).collect();
        out.set("join", parts.and_then(|parts| Tensor::cat(&parts, 1)))
    }

    fn add(&mut self, x: &mut Buffer, y: &Buffer, scale: f32) -> Result<()> {
        let sum = x.get().and_then(|x| x + (y.get()? * f64::from(scale))?);
        x.set("add", sum)
    }

    fn add_rows(&mut self, x: &mut Buffer, y: &Buffer, to: &[(u32, f32)]) -> Result<()> {
        let sum = x.get().and_then(|x| {
            let (rows, shares): (Vec<u32>, Vec<f32>) = to.iter().copied().unzip();
            let rows = Tensor::new(rows, x.device())?;
            let shares = Tensor::new(shares, x.device())?.unsqueeze(1)?;
            x.index_add(&rows, &y.get()?.broadcast_mul(&shares)?, 0)
        });
        x.set("add_rows", sum)
    }

    fn read(&self, x: &Buffer, out: &mut Vec<f32>) -> Result<()> {
        let values = x.get().and_then(|x| x.flatten_all()?.to_vec1::<f32>());
        *out = values.map_err(failed("read"))?;
        Ok(())
    }

    fn rows(&mut self, x: &Buffer, rows: &[u32], out: &mut Buffer) -> Result<()> {
        let chosen = |x: &Tensor| x.index_select(&Tensor::new(rows, x.device())?, 0);
        out.set("rows", x.get().and_then(chosen))
    }

    fn logits(
        &mut self,
        head: &Matrix,
        x: &Buffer,
        _wanted: Option<&[u32]>,
        softcap: Option<f32>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        let logits = x.get().and_then(|x| {
            let mut logits = head.times(x)?;
            if let Some(cap) = softcap.map(f64::from) {
                logits = ((logits / cap)?.tanh()? * cap)?;
            }
            logits.flatten_all()?.to_vec1::<f32>()
        });
        *out = logits.map_err(failed("logits"))?;
        Ok(())
    }
}

impl Candle {
    /// [`Device::convolve`], of all rows.
    fn short(
        &mut self,
        spec: &Convolution<Tensor>,
        batch: &Batch,
        x: &Tensor,
        cache: &KvLayer,
    ) -> candle_core::Result<Tensor> {
        let (width, back) = (spec.width, spec.positions - 1);
        let part = |i: usize| x.narrow(1, i * width, width);
        let inputs = (part(0)? * part(2)?)?;
        let half = |i: usize| inputs.narrow(1, i * (width / 2), width / 2)?.unsqueeze(1);
        cache.check(batch)?;
        self.step.store(&half(0)?, &half(1)?, cache)?;
        let weight = spec.weight.reshape((spec.positions, width))?;
        let mut outputs = Vec::with_capacity(batch.spans.len());
        for span in &batch.spans {
            let from = span.start.saturating_sub(back);
            let slots = Tensor::new(span_slots(batch, span, from)?, &self.device)?;
            let seen = |of: &Tensor| of.index_select(&slots, 0);
            let seen = Tensor::cat(&[seen(&cache.keys)?, seen(&cache.values)?], 1)?;
            // Before the beginning there is nothing.
            let missing = back - (span.start - from);
            let seen = seen.pad_with_zeros(0, missing, 0)?;
            let mut sum = match &spec.bias {
                Some(bias) => bias.broadcast_as((span.rows, width))?.contiguous()?,
                None => Tensor::zeros((span.rows, width), DType::F32, &self.device)?,
            };
            for i in 0..spec.positions {
                let at = seen.narrow(0, i, span.rows)?;
                sum = (sum + at.broadcast_mul(&weight.narrow(0, i, 1)?)?)?;
            }
            outputs.push(sum);
        }
        Tensor::cat(&outputs, 0)? * part(1)?
    }

    /// Attention of one layer over `qkv`, `[rows, (heads + 2 * kv_heads) * head_dim]`; gives `[rows, heads * head_dim]`.
    fn attend(
        &mut self,
        spec: &AttentionLayer<Tensor>,
        batch: &Batch,
        qkv: &Tensor,
        cache: &KvLayer,
    ) -> candle_core::Result<Tensor> {
        let shape = &spec.shape;
        let (heads, kv_heads, dim) = (shape.heads, shape.kv_heads, shape.head_dim);
        let rows = qkv.dim(0)?;
        let part = |first: usize, count: usize| {
            qkv.narrow(1, first * dim, count * dim)?
                .reshape((rows, count, dim))
        };
        let (mut q, mut k) = (part(0, heads)?, part(heads, kv_heads)?);
        let v = part(heads + kv_heads, kv_heads)?;
        if let Some(norms) = spec.norms.as_ref().filter(|norms| !norms.last) {
            q = norm_heads(&q, &norms.q, norms)?;
            k = norm_heads(&k, &norms.k, norms)?;
        }
        if let Some(turn) = spec.rope.and_then(|i| self.step.rotations.get(i)) {
            q = rotate(&q, spec.pairing, &turn.cos, &turn.sin)?;
            k = rotate(&k, spec.pairing, &turn.cos, &turn.sin)?;
        }
        if let Some(norms) = spec.norms.as_ref().filter(|norms| norms.last) {
            q = norm_heads(&q, &norms.q, norms)?;
            k = norm_heads(&k, &norms.k, norms)?;
        }
        let turn = spec.rope.and_then(|i| self.step.rotations.get(i));
        if let Some(scale) = turn.and_then(|turn| turn.queries.as_ref()) {
            q = q.broadcast_mul(scale)?;
        }
        cache.check(batch)?;
        self.step.store(&k, &v, cache)?;
        let views = self.step.views(shape, batch, &self.device)?;
        let outputs = views.iter().map(|view| view.attend(spec, &q, cache));
        Tensor::cat(&outputs.collect::<candle_core::Result<Vec<_>>>()?, 0)
    }
}

impl KvLayer {
    /// candle's CUDA kernels do not look where they write.
    fn check(&self, batch: &Batch) -> candle_core::Result<()> {
        let pages = self.keys.dim(0)? / PAGE;
        match batch.pages.iter().find(|&&page| page as usize >= pages) {
            Some(page) => candle_core::bail!("page {page} in a cache of {pages}"),
            None => Ok(()),
        }
    }
}

impl Step {
    fn new(batch: &Batch, ropes: &[Rope], device: &Place) -> candle_core::Result<Self> {
        let rows = batch.tokens.len();
        let mut rotations = Vec::with_capacity(ropes.len());
        for rope in ropes {
            let mut angles = Angles::default();
            angles.fill(batch, rope);
            let shape = (rows, 1, angles.per_row);
            let queries = angles.queries.take();
            let queries = queries.map(|q| Tensor::from_vec(q, (rows, 1, 1), device));
            rotations.push(Rotation {
                cos: Tensor::from_vec(angles.cos, shape, device)?,
                sin: Tensor::from_vec(angles.sin, shape, device)?,
                queries: queries.transpose()?,
            });
        }
        let mut slots = Vec::with_capacity(rows);
        for span in &batch.spans {
            slots.extend(span_slots(batch, span, span.start)?);
        }
        let slots = Tensor::from_vec(slots, (rows, 1), device)?;
        Ok(Self {
            rotations,
            slots: Some(slots),
            views: Vec::new(),
        })
    }

    /// Write the rows' keys and values, `[rows, kv_heads, head_dim]`, to their slots.
    fn store(&self, k: &Tensor, v: &Tensor, cache: &KvLayer) -> candle_core::Result<()> {
        let Some(slots) = &self.slots else {
            candle_core::bail!("attention before the step began")
        };
        let (k, v) = (k.flatten_from(1)?, v.flatten_from(1)?);
        let slots = slots.broadcast_as(k.shape())?.contiguous()?;
        cache.keys.scatter_set(&slots, &k.contiguous()?, 0)?;
        cache.values.scatter_set(&slots, &v.contiguous()?, 0)
    }

    /// The views for what this shape sees, made when a layer first asks.
    fn views(
        &mut self,
        shape: &AttentionShape,
        batch: &Batch,
        device: &Place,
    ) -> candle_core::Result<&[View]> {
        let sees = (shape.window, shape.both_ways);
        let known = self.views.iter().position(|(of, _)| *of == sees);
        let i = match known {
            Some(i) => i,
            None => {
                let spans = batch.spans.iter();
                let views = spans.map(|span| View::new(batch, span, shape, device));
                self.views
                    .push((sees, views.collect::<candle_core::Result<_>>()?));
                self.views.len() - 1
            }
        };
        Ok(&self.views[i].1)
    }
}

/// Slots of a span's positions from `from` to its last row.
fn span_slots(batch: &Batch, span: &Span, from: usize) -> candle_core::Result<Vec<u32>> {
    let end = span.start + span.rows;
    let table = batch
        .pages
        .get(span.first_page..span.first_page + span.pages);
    let Some(table) = table.filter(|table| end <= table.len() * PAGE) else {
        let pages = span.pages;
        candle_core::bail!("{end} positions in {pages} pages of {PAGE}")
    };
    let slot = |position: usize| match (table[position / PAGE] as usize * PAGE)
        .checked_add(position % PAGE)
    {
        Some(slot) => u32::try_from(slot).map_err(candle_core::Error::wrap),
        None => candle_core::bail!("page {} is out of reach", table[position / PAGE]),
    };
    (from..end).map(slot).collect()
}

impl View {
    fn new(
        batch: &Batch,
        span: &Span,
        shape: &AttentionShape,
        device: &Place,
    ) -> candle_core::Result<Self> {
        let end = span.start + span.rows;
        let from = shape.sees(span, 0).start;
        let mask = || {
            let seen = |row: usize, at: usize| shape.sees(span, row).contains(&at);
            let bias = |row, at| {
                if seen(row, at) {
                    0.0
                } else {
                    f32::NEG_INFINITY
                }
            };
            let values: Vec<f32> = (0..span.rows)
                .flat_map(|row| (from..end).map(move |at| bias(row, at)))
                .collect();
            Tensor::from_vec(values, (span.rows, end - from), device)
        };
        Ok(Self {
            first_row: span.first_row,
            rows: span.rows,
            start: span.start,
            from,
            slots: Tensor::new(span_slots(batch, span, from)?, device)?,
            mask: (span.rows > 1).then(mask).transpose()?,
        })
    }

    /// `softmax(q k^T * scale) v` of this span's rows of `q`, `[all rows, heads, dim]`; gives `[rows, heads * dim]`.
    fn attend(
        &self,
        spec: &AttentionLayer<Tensor>,
        q: &Tensor,
        cache: &KvLayer,
    ) -> candle_core::Result<Tensor> {
        let shape = &spec.shape;
        let (rows, n) = (self.rows, self.slots.dim(0)?);
        let (kv_heads, dim) = (shape.kv_heads, shape.head_dim);
        // The query heads that share a key head stand together: they become rows of one multiplication.
        let group = shape.heads / kv_heads;
        let seen = |of: &Tensor| {
            let of = of.index_select(&self.slots, 0)?;
            of.reshape((n, kv_heads, dim))?
                .transpose(0, 1)?
                .contiguous()
        };
        let (k, v) = (seen(&cache.keys)?, seen(&cache.values)?);
        let q = q.narrow(0, self.first_row, rows)?;
        let q = q
            .reshape((rows, kv_heads, group, dim))?
            .permute((1, 2, 0, 3))?;
        let q = q.reshape((kv_heads, group * rows, dim))?;
        let mut scores = (q.matmul(&k.transpose(1, 2)?)? * f64::from(shape.scale))?;
        if let Some(cap) = shape.softcap.map(f64::from) {
            scores = ((scores / cap)?.tanh()? * cap)?;
        }
        if let Some(table) = &spec.distances {
            let more = self.by_distance(table, shape.heads, n)?;
            scores = (scores + more.reshape((kv_heads, group * rows, n))?)?;
        }
        if let Some(mask) = &self.mask {
            let by_row = scores.reshape((kv_heads, group, rows, n))?;
            scores = by_row
                .broadcast_add(mask)?
                .reshape((kv_heads, group * rows, n))?;
        }
        if let Some(sinks) = &spec.sinks {
            // A column more, which has no value.
            let sinks = sinks.reshape((kv_heads, group, 1, 1))?;
            let sinks = sinks.broadcast_as((kv_heads, group, rows, 1))?;
            let sinks = sinks.reshape((kv_heads, group * rows, 1))?;
            scores = Tensor::cat(&[scores, sinks], 2)?;
        }
        let attended = softmax(&scores)?
            .narrow(2, 0, n)?
            .contiguous()?
            .matmul(&v)?;
        let attended = attended.reshape((kv_heads, group, rows, dim))?;
        attended
            .permute((2, 0, 1, 3))?
            .reshape((rows, shape.heads * dim))
    }

    /// What each head adds to the scores of these rows, `[heads, rows, n]`.
    fn by_distance(&self, table: &Tensor, heads: usize, n: usize) -> candle_core::Result<Tensor> {
        let table = table.reshape((heads, table.elem_count() / heads))?;
        let reach = table.dim(1)? / 2;
        let queries = self.start..self.start + self.rows;
        let places: Vec<u32> = queries
            .flat_map(|q| (self.from..self.from + n).map(move |k| (reach + k - q) as u32))
            .collect();
        let places = Tensor::from_vec(places, self.rows * n, table.device())?;
        table.index_select(&places, 1)
    }
}

/// Over the last dimension. Every row has a finite number: a position sees itself.
fn softmax(scores: &Tensor) -> candle_core::Result<Tensor> {
    let shifted = scores.broadcast_sub(&scores.max_keepdim(D::Minus1)?)?;
    let exps = shifted.exp()?;
    exps.broadcast_div(&exps.sum_keepdim(D::Minus1)?)
}

/// `x / rms(x) * weight` over the last dimension (Zhang and Sennrich 2019, arXiv:1910.07467), or of `x - mean(x)`.
fn normalise(x: &Tensor, weight: &Tensor, eps: f32, centred: bool) -> candle_core::Result<Tensor> {
    let x = match centred {
        true => &x.broadcast_sub(&x.mean_keepdim(D::Minus1)?)?,
        false => x,
    };
    let mean = x.sqr()?.mean_keepdim(D::Minus1)?;
    let scale = (mean + f64::from(eps))?.sqrt()?.recip()?;
    x.broadcast_mul(&scale)?.broadcast_mul(weight)
}

/// The heads of `x`, `[rows, heads, dim]`, by weights for all their numbers.
fn norm_heads(x: &Tensor, weight: &Tensor, by: &HeadNorms<Tensor>) -> candle_core::Result<Tensor> {
    let (rows, heads, dim) = x.dims3()?;
    if !by.together {
        let weight = weight.reshape((heads, dim))?;
        return normalise(x, &weight, by.eps, by.centred);
    }
    let whole = x.reshape((rows, heads * dim))?;
    normalise(&whole, weight, by.eps, by.centred)?.reshape((rows, heads, dim))
}

/// Gates before what they gate, `[rows, 2 * width]`.
fn gate(activation: Activation, both: &Tensor) -> candle_core::Result<Tensor> {
    let width = both.dim(1)? / 2;
    let gate = activate(activation, &both.narrow(1, 0, width)?)?;
    let up = both.narrow(1, width, width)?;
    match activation {
        Activation::ClampedSwish => gate * (up.clamp(-SWISH_LIMIT, SWISH_LIMIT)? + 1.0)?,
        _ => gate * up,
    }
}

fn activate(activation: Activation, x: &Tensor) -> candle_core::Result<Tensor> {
    match activation {
        Activation::Silu => x.silu(),
        // candle's `gelu` is the tanh form; the exact one is `gelu_erf`.
        Activation::GeluTanh => x.gelu(),
        Activation::Gelu => x.gelu_erf(),
        Activation::Relu => x.relu(),
        Activation::ReluSquared => x.relu()?.sqr(),
        Activation::ClampedSwish => {
            let x = x.minimum(SWISH_LIMIT)?;
            let e = (&x * f64::from(-SWISH_ALPHA))?.exp()?;
            x / (e + 1.0)?
        }
        Activation::Xielu {
            positive,
            negative,
            beta,
        } => {
            let (above, below) = (x.relu()?, x.minimum(0f32)?);
            let square = (above.sqr()? * f64::from(positive))?;
            let curve = (((below.exp()? - 1.0)? - below)? * f64::from(negative))?;
            (square + curve)? + (x * f64::from(beta))?
        }
    }
}

/// Rotate the first `2 * angles` numbers of every head of `x`, `[rows, heads, dim]`, by `cos` and `sin`,
/// `[rows, 1, angles]` (Su et al. 2021, arXiv:2104.09864).
fn rotate(x: &Tensor, pairing: Pairing, cos: &Tensor, sin: &Tensor) -> candle_core::Result<Tensor> {
    let (rows, heads, dim) = x.dims3()?;
    let angles = cos.dim(2)?;
    let turned = x.narrow(2, 0, 2 * angles)?.contiguous()?;
    let (a, b) = match pairing {
        Pairing::Halves => (
            turned.narrow(2, 0, angles)?,
            turned.narrow(2, angles, angles)?,
        ),
        Pairing::Neighbours => {
            let pairs = turned.reshape((rows, heads, angles, 2))?;
            (
                pairs.narrow(3, 0, 1)?.squeeze(3)?,
                pairs.narrow(3, 1, 1)?.squeeze(3)?,
            )
        }
    };
    let first = (a.broadcast_mul(cos)? - b.broadcast_mul(sin)?)?;
    let second = (b.broadcast_mul(cos)? + a.broadcast_mul(sin)?)?;
    let turned = match pairing {
        Pairing::Halves => Tensor::cat(&[first, second], 2)?,
        Pairing::Neighbours => {
            Tensor::stack(&[first, second], 3)?.reshape((rows, heads, 2 * angles))?
        }
    };
    if dim == 2 * angles {
        return Ok(turned);
    }
    let rest = x.narrow(2, 2 * angles, dim - 2 * angles)?;
    Tensor::cat(&[turned, rest.contiguous()?], 2)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn step(pages: &[u32]) -> (Candle, Batch) {
        let mut batch = Batch::default();
        batch.push(&[0; 3], 0, pages, false);
        let mut candle = Candle::cpu();
        candle.begin(&batch, &[]).unwrap();
        (candle, batch)
    }

    /// One head of two numbers, no norms, no positions.
    fn plain() -> AttentionLayer<Tensor> {
        let shape = AttentionShape {
            heads: 1,
            kv_heads: 1,
            head_dim: 2,
            scale: 1.0,
            softcap: None,
            window: None,
            both_ways: false,
        };
        AttentionLayer {
            shape,
            norms: None,
            sinks: None,
            distances: None,
            rope: None,
            pairing: Pairing::Halves,
        }
    }

    #[test]
    fn equal_scores_give_the_mean_of_the_values_seen() {
        let attended = |window: Option<usize>| -> Vec<f32> {
            let (mut candle, batch) = step(&[1]);
            let mut spec = plain();
            spec.shape.window = window;
            let mut cache = candle.cache(2, &[spec.shape]).unwrap();
            let (mut qkv, mut out) = (Buffer::default(), Buffer::default());
            let rows = [
                0., 0., 5., 5., 1., 2., 0., 0., 5., 5., 3., 6., 0., 0., 5., 5., 8., 1.,
            ];
            candle.upload(&rows, 6, &mut qkv).unwrap();
            candle
                .attention(0, &spec, &batch, &mut qkv, &mut cache, false, &mut out)
                .unwrap();
            out.get().unwrap().flatten_all().unwrap().to_vec1().unwrap()
        };
        assert_eq!(attended(None), [1.0, 2.0, 2.0, 4.0, 4.0, 3.0]);
        assert_eq!(attended(Some(2)), [1.0, 2.0, 2.0, 4.0, 5.5, 3.5]);
        assert_eq!(attended(Some(1)), [1.0, 2.0, 3.0, 6.0, 8.0, 1.0]);
    }

    #[test]
    fn a_quarter_turn_swaps_the_numbers_of_a_pair_and_leaves_the_rest() {
        let at = Place::Cpu;
        let x = Tensor::new(&[[[1f32, 2.0, 3.0, 4.0, 9.0]]], &at).unwrap();
        let cos = Tensor::new(&[[[0f32, 0.0]]], &at).unwrap();
        let sin = Tensor::new(&[[[1f32, 1.0]]], &at).unwrap();
        let turned = |pairing| {
            let turned = rotate(&x, pairing, &cos, &sin).unwrap();
            turned.flatten_all().unwrap().to_vec1::<f32>().unwrap()
        };
        assert_eq!(turned(Pairing::Halves), [-3.0, -4.0, 1.0, 2.0, 9.0]);
        assert_eq!(turned(Pairing::Neighbours), [-2.0, 1.0, -4.0, 3.0, 9.0]);
    }

    #[test]
    fn what_a_tensor_cannot_do_is_an_internal_error_with_its_operation() {
        let says = |result: Result<()>, words: &str| {
            let error = result.unwrap_err();
            assert!(matches!(error, Error::Internal(_)), "{error:?}");
            assert!(error.to_string().contains(words), "{error}");
        };
        let (mut candle, batch) = step(&[2]);
        let mut out = Buffer::default();
        let unwritten = candle.add(&mut out, &Buffer::default(), 1.0);
        says(unwritten, "candle, add: a buffer was read before");
        let mut qkv = Buffer::default();
        candle.upload(&[0.0; 18], 6, &mut qkv).unwrap();
        let mut cache = candle.cache(2, &[plain().shape]).unwrap();
        let mut run = |layer, candle: &mut Candle| {
            candle.attention(
                layer,
                &plain(),
                &batch,
                &mut qkv,
                &mut cache,
                false,
                &mut out,
            )
        };
        says(
            run(0, &mut candle),
            "candle, attention: page 2 in a cache of 2",
        );
        says(run(1, &mut candle), "layer 1 in a cache of 1");
        says(run(0, &mut Candle::cpu()), "page 2 in a cache of 2");
        let mut short = batch.clone();
        short.spans[0].rows = 17;
        says(
            candle.begin(&short, &[]),
            "candle, begin: 17 positions in 1 pages of 16",
        );
    }
}
