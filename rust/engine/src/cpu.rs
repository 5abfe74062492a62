//! [`Device`] over the kernels crate: f32 activations, weights in tiles, a cache in pages, threads of its own.

use hfcore_kernels::activations::{ActBlock, Activations, Scales, quantize_rows, round_rows};
use hfcore_kernels::attention::{AttentionInput, AttentionPlan, KvLayer, KvType, attend};
use hfcore_kernels::elementwise::{self, Activation, HeadNorms, HeadPrep, Rotation, Twin};
use hfcore_kernels::matmul::{Matrix, Store, gated, matmul, matmul_chosen};
use hfcore_kernels::mmap::Arena;
use hfcore_kernels::pool::Pool;
use hfcore_kernels::simd::Isa;
use hfcore_kernels::tile::{BLOCK, Tiles};

use crate::arch::Rope;
use crate::batch::{Batch, PAGE, Span};
use crate::conversion::Conversion;
use crate::device::{Angles, AttentionLayer, AttentionShape, Convolution, Device, Norm};
use crate::error::Result;
use crate::weights::Tensor;

/// The CPU. Keeps its workspace, so that a step allocates nothing once the largest has been seen.
pub struct Cpu {
    isa: Isa,
    pool: Pool,
    angles: Vec<Angles>,
    converted: Converted,
    plan: AttentionPlan,
    /// Queries of the rows whose outputs are wanted, and their spans.
    queries: Vec<f32>,
    output_spans: Vec<Span>,
    /// What convolutions keep of a step's rows.
    inputs: Vec<f32>,
    kv_type: KvType,
    split: bool,
    /// Where weights are packed into.
    arena: Arena,
}

/// Rows of f32, and the same quantised where an operation has already done so while it had them at hand.
#[derive(Default)]
pub struct Buffer {
    values: Vec<f32>,
    width: usize,
    /// `[rows][width / 32]`, if `scales` says how.
    blocks: Vec<ActBlock>,
    scales: Option<Scales>,
}

impl Buffer {
    fn rows(&self) -> usize {
        self.values.len().checked_div(self.width).unwrap_or(0)
    }
    fn shape(&mut self, rows: usize, width: usize) -> &mut [f32] {
        self.width = width;
        self.values.resize(rows * width, 0.0);
        self.scales = None;
        &mut self.values
    }
    /// The same, with a twin as the matrix wants it that will read them.
    fn shape_for(
        &mut self,
        next: Option<&Matrix>,
        rows: usize,
        width: usize,
    ) -> (&mut [f32], Option<Twin<'_>>) {
        self.shape(rows, width);
        self.scales = next.and_then(Matrix::scales);
        let Some(scales) = self.scales else {
            return (&mut self.values, None);
        };
        self.blocks
            .resize(rows * width / BLOCK, ActBlock::default());
        let blocks = &mut self.blocks;
        (&mut self.values, Some(Twin { scales, blocks }))
    }
}

impl Cpu {
    /// On `threads` threads; `None`: as many CPUs as this process may use.
    pub fn new(threads: Option<usize>) -> Self {
        Self {
            isa: Isa::detect(),
            pool: Pool::new(threads.unwrap_or_else(Pool::available)),
            angles: Vec::new(),
            converted: Converted::default(),
            plan: AttentionPlan::default(),
            queries: Vec::new(),
            output_spans: Vec::new(),
            inputs: Vec::new(),
            kv_type: KvType::default(),
            split: false,
            arena: Arena::default(),
        }
    }

    /// The same, with keys and values kept as `kv_type`.
    pub fn with_kv_type(self, kv_type: KvType) -> Self {
        Self { kv_type, ..self }
    }

    /// The same; `split`: products with BF16 weights lose nothing of the activations, [`Matrix::splitting`].
    pub fn with_split(self, split: bool) -> Self {
        Self { split, ..self }
    }

    /// Its instruction set and threads, for reports.
    pub fn describe(&self) -> (&'static str, usize) {
        (self.isa.name(), self.pool.threads())
    }

    /// Bytes that a page takes over all layers.
    pub fn page_bytes(kv_type: KvType, shapes: &[AttentionShape]) -> usize {
        shapes
            .iter()
            .map(|s| KvLayer::page_bytes(kv_type, s.kv_heads, s.head_dim))
            .sum()
    }
}

/// Activations as the matrix wants them that reads them next.
#[derive(Default)]
struct Converted {
    /// Quantised in blocks, and in super-blocks.
    blocks: [Vec<ActBlock>; 2],
    /// Rounded to bf16.
    pairs: Vec<[u16; 2]>,
}

/// The rows of `x` as a matrix reads them: converted, where `x` has not been already.
fn activations<'a>(
    isa: Isa,
    pool: &Pool,
    matrix: &Matrix,
    x: &'a Buffer,
    converted: &'a mut Converted,
) -> Activations<'a> {
    let Converted { blocks, pairs } = converted;
    for (scales, blocks) in [Scales::Block, Scales::Super].iter().zip(&mut *blocks) {
        if matrix.needs(*scales) && x.scales != Some(*scales) {
            blocks.resize(x.values.len() / BLOCK, ActBlock::default());
            quantize_rows(isa, pool, &x.values, x.width, *scales, blocks);
        }
    }
    if matrix.needs_pairs() {
        let parts = if matrix.splits() { 2 } else { 1 };
        pairs.resize(x.rows() * x.width.div_ceil(2) * parts, [0; 2]);
        round_rows(isa, pool, &x.values, x.width, matrix.splits(), pairs);
    }
    let of = |scales: Scales, blocks: &'a [ActBlock]| match x.scales == Some(scales) {
        true => &x.blocks,
        false => blocks,
    };
    Activations {
        rows: x.rows(),
        floats: &x.values,
        pairs,
        blocks: of(Scales::Block, &blocks[0]),
        supers: of(Scales::Super, &blocks[1]),
    }
}

impl Cpu {
    /// A part of a matrix, quantised on the way where that is wanted.
    fn tiles(&self, part: &Tensor) -> Result<Tiles> {
        let (arena, pool) = (&self.arena, &self.pool);
        let (rows, cols) = (part.rows(), part.cols());
        let Some(target) = part.target else {
            let forget = |bytes| part.forget(bytes);
            let (tensor_type, data) = (part.tensor_type, part.data);
            return Ok(Tiles::pack_in(
                arena,
                tensor_type,
                rows,
                cols,
                data,
                pool,
                forget,
            ));
        };
        if let Some(ready) = part.ready {
            return Ok(Tiles::pack_in(
                arena,
                target.tensor_type,
                rows,
                cols,
                ready.blocks(),
                pool,
                |bytes| ready.forget(bytes),
            ));
        }
        let conversion = Conversion::new(pool, *part, target)?;
        let bytes = part.data.len() / rows.max(1);
        Ok(Tiles::pack_made(
            arena,
            target.tensor_type,
            (rows, cols),
            pool,
            |row, out| conversion.row(row, None, out),
            |rows| part.forget(rows.start * bytes..rows.end * bytes),
        ))
    }

    fn multiply(
        &mut self,
        matrix: &Matrix,
        x: &Buffer,
        store: Store,
        out: &mut Buffer,
    ) -> Result<()> {
        let (isa, pool) = (self.isa, &self.pool);
        let x = activations(isa, pool, matrix, x, &mut self.converted);
        matmul(isa, pool, matrix, x, store, &mut out.values);
        Ok(())
    }
}

impl Device for Cpu {
    type Matrix = Matrix;
    type Vector = Vec<f32>;
    type Buffer = Buffer;
    type Cache = Vec<KvLayer>;

    fn packing(&self) -> Option<&Pool> {
        Some(&self.pool)
    }

    fn matrix(&self, parts: &[Tensor], bias: Option<&[f32]>) -> Result<Matrix> {
        let tiles: Result<_> = parts.iter().map(|part| self.tiles(part)).collect();
        Ok(Matrix::new(tiles?, bias).splitting(self.split))
    }

    fn vector(&self, values: Vec<f32>) -> Result<Vec<f32>> {
        Ok(values)
    }

    fn cache(&self, pages: usize, shapes: &[AttentionShape]) -> Result<Vec<KvLayer>> {
        Ok(shapes
            .iter()
            .map(|s| KvLayer::new(self.kv_type, pages, s.kv_heads, s.head_dim))
            .collect())
    }

    fn page_bytes(cache: &Vec<KvLayer>) -> Option<usize> {
        Some(cache.iter().map(KvLayer::bytes_of_page).sum())
    }

    fn read_page(cache: &Vec<KvLayer>, page: u32, out: &mut Vec<u8>) {
        for layer in cache {
            layer.read_page(page as usize, out);
        }
    }

    fn write_page(cache: &mut Vec<KvLayer>, page: u32, mut bytes: &[u8]) {
        for layer in cache {
            bytes = layer.write_page(page as usize, bytes);
        }
    }

    fn begin(&mut self, batch: &Batch, ropes: &[Rope]) -> Result<()> {
        self.angles.resize(ropes.len(), Angles::default());
        for (angles, rope) in self.angles.iter_mut().zip(ropes) {
            angles.fill(batch, rope);
        }
        Ok(())
    }

    fn upload(&mut self, values: &[f32], width: usize, out: &mut Buffer) -> Result<()> {
        out.shape(values.len() / width, width)
            .copy_from_slice(values);
        Ok(())
    }

    fn norm(
        &mut self,
        x: &Buffer,
        norm: &Norm<Vec<f32>>,
        next: Option<&Matrix>,
        out: &mut Buffer,
    ) -> Result<()> {
        let (out, twin) = out.shape_for(next, x.rows(), x.width);
        let by = elementwise::Norm {
            weight: &norm.weight,
            bias: norm.bias.as_deref(),
            eps: norm.eps,
            centred: norm.centred,
        };
        elementwise::norm(self.isa, &self.pool, &x.values, by, out, twin);
        Ok(())
    }

    fn linear(&mut self, matrix: &Matrix, x: &Buffer, out: &mut Buffer) -> Result<()> {
        out.shape(x.rows(), matrix.outputs());
        self.multiply(matrix, x, Store::Set, out)
    }

    fn linear_add(&mut self, matrix: &Matrix, x: &Buffer, out: &mut Buffer) -> Result<()> {
        out.scales = None;
        self.multiply(matrix, x, Store::Add, out)
    }

    fn gated(
        &mut self,
        activation: Activation,
        matrix: &Matrix,
        x: &Buffer,
        out: &mut Buffer,
    ) -> Result<()> {
        let out = out.shape(x.rows(), matrix.outputs() / 2);
        let (isa, pool) = (self.isa, &self.pool);
        let x = activations(isa, pool, matrix, x, &mut self.converted);
        gated(isa, pool, matrix, activation, x, out);
        Ok(())
    }

    fn activated(
        &mut self,
        activation: Activation,
        matrix: &Matrix,
        x: &Buffer,
        out: &mut Buffer,
    ) -> Result<()> {
        out.shape(x.rows(), matrix.outputs());
        self.multiply(matrix, x, Store::Activate(activation), out)
    }

    fn activate(
        &mut self,
        activation: Activation,
        gated: bool,
        x: &Buffer,
        out: &mut Buffer,
    ) -> Result<()> {
        let width = x.width / (1 + usize::from(gated));
        let out = out.shape(x.rows(), width);
        let (isa, pool) = (self.isa, &self.pool);
        elementwise::activate_rows(isa, pool, activation, gated, &x.values, width, out);
        Ok(())
    }

    fn attention(
        &mut self,
        layer: usize,
        spec: &AttentionLayer<Vec<f32>>,
        batch: &Batch,
        qkv: &mut Buffer,
        cache: &mut Vec<KvLayer>,
        outputs_only: bool,
        out: &mut Buffer,
    ) -> Result<()> {
        let shape = &spec.shape;
        let angles = spec.rope.map(|i| &self.angles[i]);
        let prep = HeadPrep {
            heads: shape.heads,
            kv_heads: shape.kv_heads,
            head_dim: shape.head_dim,
            norms: spec.norms.as_ref().map(|n| HeadNorms {
                q: &n.q,
                k: &n.k,
                eps: n.eps,
                centred: n.centred,
                together: n.together,
                last: n.last,
            }),
            query_scale: angles.and_then(|a| a.queries.as_deref()),
            rotation: angles.map(|a| Rotation {
                pairing: spec.pairing,
                cos: &a.cos,
                sin: &a.sin,
                angles: a.per_row,
            }),
        };
        let width = qkv.width;
        elementwise::prepare_heads(self.isa, &self.pool, &prep, &mut qkv.values, width);
        let cache = &mut cache[layer];
        let keys = shape.heads * shape.head_dim;
        cache.store(
            self.isa,
            &self.pool,
            &batch.spans,
            &batch.pages,
            &qkv.values,
            width,
            keys,
        );
        let mut input = AttentionInput {
            spans: &batch.spans,
            pages: &batch.pages,
            q: &qkv.values,
            width,
            sinks: spec.sinks.as_deref(),
            distances: spec.distances.as_deref(),
        };
        let mut rows = qkv.rows();
        if outputs_only {
            rows = batch.outputs.len();
            self.queries.clear();
            for &row in &batch.outputs {
                let row = &qkv.values[row as usize * width..];
                self.queries.extend_from_slice(&row[..keys]);
            }
            batch.output_spans(&mut self.output_spans);
            input = AttentionInput {
                spans: &self.output_spans,
                pages: &batch.pages,
                q: &self.queries,
                width: keys,
                sinks: spec.sinks.as_deref(),
                distances: spec.distances.as_deref(),
            };
        }
        attend(
            self.isa,
            &self.pool,
            &mut self.plan,
            shape,
            cache,
            &input,
            out.shape(rows, keys),
        );
        Ok(())
    }

    fn convolve(
        &mut self,
        layer: usize,
        spec: &Convolution<Vec<f32>>,
        batch: &Batch,
        x: &Buffer,
        cache: &mut Vec<KvLayer>,
        outputs_only: bool,
        out: &mut Buffer,
    ) -> Result<()> {
        let (width, back) = (spec.width, spec.positions - 1);
        let inputs = &mut self.inputs;
        inputs.resize(x.rows() * width, 0.0);
        let rows = x.values.chunks_exact(x.width);
        for (row, input) in rows.zip(inputs.chunks_exact_mut(width)) {
            let gated = row[..width].iter().zip(&row[2 * width..]);
            input
                .iter_mut()
                .zip(gated)
                .for_each(|(i, (a, x))| *i = a * x);
        }
        let cache = &mut cache[layer];
        let (spans, pages) = (&batch.spans, &batch.pages);
        cache.store(self.isa, &self.pool, spans, pages, inputs, width, 0);
        let rows = match outputs_only {
            true => batch.outputs.len(),
            false => x.rows(),
        };
        let (cache, inputs) = (&*cache, &*inputs);
        let out = out.shape(rows, width);
        self.pool.rows(out, width, |i, out| {
            let row = if outputs_only {
                batch.outputs[i] as usize
            } else {
                i
            };
            let span = &spans[spans.partition_point(|s| s.first_row + s.rows <= row)];
            let at = span.start + row - span.first_row;
            match &spec.bias {
                Some(bias) => out.copy_from_slice(bias),
                None => out.fill(0.0),
            }
            // What came before is what the cache has of it, also where it is of this step: how a prompt was cut shows
            // in no bit.
            for before in (1..=back.min(at)).rev() {
                let page = pages[span.first_page + (at - before) / PAGE];
                let by = &spec.weight[(back - before) * width..][..width];
                cache.add_row(page as usize, (at - before) % PAGE, by, out);
            }
            let own = inputs[row * width..]
                .iter()
                .zip(&spec.weight[back * width..]);
            let gate = &x.values[row * x.width + width..];
            for ((out, (x, by)), gate) in out.iter_mut().zip(own).zip(gate) {
                *out = (*out + by * x) * gate;
            }
        });
        Ok(())
    }

    fn clamp(&mut self, x: &mut Buffer, limit: f32) -> Result<()> {
        x.scales = None;
        x.values
            .iter_mut()
            .for_each(|x| *x = x.clamp(-limit, limit));
        Ok(())
    }

    fn columns(&mut self, x: &Buffer, from: usize, width: usize, out: &mut Buffer) -> Result<()> {
        let out = out.shape(x.rows(), width);
        let rows = x.values.chunks_exact(x.width);
        for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(&row[from..from + width]);
        }
        Ok(())
    }

    fn join(&mut self, parts: &[&Buffer], out: &mut Buffer) -> Result<()> {
        let width = parts.iter().map(|part| part.width).sum();
        let out = out.shape(parts.first().map_or(0, |part| part.rows()), width);
        let mut from = 0;
        for part in parts {
            let rows = part.values.chunks_exact(part.width);
            for (row, out) in rows.zip(out.chunks_exact_mut(width)) {
                out[from..from + part.width].copy_from_slice(row);
            }
            from += part.width;
        }
        Ok(())
    }

    fn add(&mut self, x: &mut Buffer, y: &Buffer, scale: f32) -> Result<()> {
        x.scales = None;
        elementwise::add(self.isa, &self.pool, &mut x.values, &y.values, scale);
        Ok(())
    }

    fn add_rows(&mut self, x: &mut Buffer, y: &Buffer, to: &[(u32, f32)]) -> Result<()> {
        x.scales = None;
        let width = x.width;
        for (&(row, share), y) in to.iter().zip(y.values.chunks_exact(width)) {
            let x = &mut x.values[row as usize * width..][..width];
            elementwise::add(self.isa, &self.pool, x, y, share);
        }
        Ok(())
    }

    fn read(&self, x: &Buffer, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        out.extend_from_slice(&x.values);
        Ok(())
    }

    fn rows(&mut self, x: &Buffer, rows: &[u32], out: &mut Buffer) -> Result<()> {
        let width = x.width;
        let out = out.shape(rows.len(), width);
        for (&row, out) in rows.iter().zip(out.chunks_exact_mut(width)) {
            out.copy_from_slice(&x.values[row as usize * width..][..width]);
        }
        Ok(())
    }

    fn logits(
        &mut self,
        head: &Matrix,
        x: &Buffer,
        wanted: Option<&[u32]>,
        softcap: Option<f32>,
        out: &mut Vec<f32>,
    ) -> Result<()> {
        out.resize(x.rows() * head.outputs(), 0.0);
        let store = softcap.map_or(Store::Set, Store::Softcap);
        let (isa, pool) = (self.isa, &self.pool);
        let x = activations(isa, pool, head, x, &mut self.converted);
        match wanted {
            // Of several parts not every tile would have all its tokens.
            Some(tiles) if head.parts.len() == 1 => {
                matmul_chosen(isa, pool, head, x, store, tiles, out);
            }
            _ => matmul(isa, pool, head, x, store, out),
        }
        Ok(())
    }
}
