//! The one transformer, generic over its device: a batch of tokens in, logits out. Knows no request.

use std::collections::HashSet;
use std::sync::Arc;

use crate::arch::{Arch, LayerArch};
use crate::batch::{Batch, Caller, Forward};
use crate::device::{AttentionLayer, AttentionShape, Device, TILE};
use crate::error::{Error, Result};
use crate::weights::{Tensor, Weights};

/// Told `(done, total)` while a model is loaded; false stops it.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) -> bool + Sync);

/// A layer's weights on a device.
struct Layer<D: Device> {
    attn_norm: D::Vector,
    qkv: D::Matrix,
    attention: AttentionLayer<D::Vector>,
    attn_output: D::Matrix,
    post_attn_norm: Option<D::Vector>,
    ffn_norm: D::Vector,
    gate_up: D::Matrix,
    ffn_down: D::Matrix,
    post_ffn_norm: Option<D::Vector>,
}

/// A model's weights on a device, shared by every decoder that runs it.
pub struct Resident<D: Device> {
    pub arch: Arch,
    weights: Arc<Weights>,
    /// Name of the embedding's tensor, read row by row from the file.
    embedding: String,
    layers: Vec<Layer<D>>,
    output_norm: D::Vector,
    output: D::Matrix,
}

/// The shapes of all layers' attention: what a cache is made for.
pub fn attention_shapes(arch: &Arch) -> Vec<AttentionShape> {
    arch.layers
        .iter()
        .map(|l| attention_shape(arch, l))
        .collect()
}

fn attention_shape(arch: &Arch, layer: &LayerArch) -> AttentionShape {
    AttentionShape {
        heads: arch.heads,
        kv_heads: arch.kv_heads,
        head_dim: arch.head_dim,
        scale: arch.attention_scale,
        softcap: arch.attention_softcap,
        window: layer.window,
    }
}

/// Reads tensors by their role, checks their shapes, remembers which were used.
struct Loader<'a, D: Device> {
    device: &'a D,
    arch: &'a Arch,
    weights: &'a Weights,
    used: HashSet<String>,
}

impl<'a, D: Device> Loader<'a, D> {
    /// The tensor `name` of `layer`, which must be `[rows, cols]`.
    fn tensor(
        &mut self,
        layer: Option<usize>,
        name: &str,
        rows: usize,
        cols: usize,
    ) -> Result<Tensor<'a>> {
        let name = self.arch.tensor_name(layer, name);
        let tensor = self.weights.require(&name)?;
        let fits = match tensor.shape {
            [n] => rows == 1 && *n == cols,
            [m, n] => *m == rows && *n == cols,
            _ => false,
        };
        if !fits {
            let got = tensor.shape;
            return Err(self.weights.problem(format!(
                "tensor {name:?} is {got:?}, wanted [{rows}, {cols}]"
            )));
        }
        self.used.insert(name);
        Ok(tensor)
    }

    fn norm(&mut self, layer: Option<usize>, name: &str, width: usize) -> Result<D::Vector> {
        let mut values = self.tensor(layer, name, 1, width)?.dequantize();
        values.iter_mut().for_each(|x| *x += self.arch.norm_offset);
        self.device.vector(values)
    }

    /// Matrices that share their inputs, `(name, outputs)`, with their biases if the file has them.
    fn matrix(
        &mut self,
        layer: Option<usize>,
        parts: &[(&str, usize)],
        inputs: usize,
        needs_bias: bool,
    ) -> Result<D::Matrix> {
        let mut tensors = Vec::new();
        let mut bias = Vec::new();
        let mut has_bias = false;
        for &(name, outputs) in parts {
            tensors.push(self.tensor(layer, &format!("{name}.weight"), outputs, inputs)?);
            let bias_name = format!("{name}.bias");
            let present = self
                .weights
                .tensor(&self.arch.tensor_name(layer, &bias_name))
                .is_some();
            if present || needs_bias {
                bias.extend(self.tensor(layer, &bias_name, 1, outputs)?.dequantize());
                has_bias = true;
            } else {
                bias.extend(std::iter::repeat_n(0.0, outputs));
            }
        }
        let matrix = self.device.matrix(&tensors, has_bias.then_some(&bias))?;
        // Now that they are resident twice, one of them may go.
        tensors.iter().for_each(|t| t.forget(0..t.data.len()));
        Ok(matrix)
    }

    fn layer(&mut self, i: usize) -> Result<Layer<D>> {
        let (arch, at) = (self.arch, Some(i));
        let (hidden, ff) = (arch.hidden_size, arch.intermediate_size);
        let (q, kv) = (arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim);
        let qkv: &[(&str, usize)] = match arch.fused {
            true => &[("attn_qkv", q + 2 * kv)],
            false => &[("attn_q", q), ("attn_k", kv), ("attn_v", kv)],
        };
        let norms = match arch.qk_norm {
            true => Some((
                self.norm(at, "attn_q_norm.weight", arch.head_dim)?,
                self.norm(at, "attn_k_norm.weight", arch.head_dim)?,
                arch.norm_eps,
            )),
            false => None,
        };
        let post = |this: &mut Self, name: &str| match arch.post_norms {
            true => this.norm(at, name, hidden).map(Some),
            false => Ok(None),
        };
        Ok(Layer {
            attn_norm: self.norm(at, "attn_norm.weight", hidden)?,
            qkv: self.matrix(at, qkv, hidden, arch.qkv_bias)?,
            attention: AttentionLayer {
                shape: attention_shape(arch, &arch.layers[i]),
                norms,
                rope: arch.layers[i].rope,
                pairing: arch.pairing,
            },
            attn_output: self.matrix(at, &[("attn_output", hidden)], q, false)?,
            post_attn_norm: post(self, "post_attention_norm.weight")?,
            ffn_norm: self.norm(at, "ffn_norm.weight", hidden)?,
            gate_up: self.gate_up(at, hidden, ff)?,
            ffn_down: self.matrix(at, &[("ffn_down", hidden)], ff, false)?,
            post_ffn_norm: post(self, "post_ffw_norm.weight")?,
        })
    }

    /// Gate and up side by side. Fused ones are one tensor: GGUF calls it `ffn_up`, transformers `gate_up_proj`.
    fn gate_up(&mut self, at: Option<usize>, hidden: usize, ff: usize) -> Result<D::Matrix> {
        if !self.arch.fused {
            return self.matrix(at, &[("ffn_gate", ff), ("ffn_up", ff)], hidden, false);
        }
        let both = self.arch.tensor_name(at, "ffn_gate_up.weight");
        let name = match self.weights.tensor(&both) {
            Some(_) => "ffn_gate_up.weight",
            None => "ffn_up.weight",
        };
        let both = self.tensor(at, name, 2 * ff, hidden)?;
        let matrix = self.device.matrix(&both.halves(), None)?;
        both.forget(0..both.data.len());
        Ok(matrix)
    }

    /// A tensor that nobody used means that the file is not what its architecture says.
    fn check_all_used(&self) -> Result<()> {
        let known = |name: &str| {
            let spare = [
                "rope_freqs.weight",
                "rope_factors_long.weight",
                "rope_factors_short.weight",
            ];
            spare.contains(&name)
                || name.ends_with("rotary_emb.inv_freq")
                || name == self.arch.tensor_name(None, "output.weight")
        };
        let mut unused: Vec<_> = self
            .weights
            .tensors
            .keys()
            .filter(|n| !self.used.contains(*n) && !known(n))
            .collect();
        unused.sort();
        let Some(first) = unused.first() else {
            return Ok(());
        };
        Err(self.weights.problem(format!(
            "{} tensors have no place in architecture {:?}, {first:?} the first",
            unused.len(),
            self.arch.family
        )))
    }
}

impl<D: Device> Resident<D> {
    /// Make a model resident, layer by layer; `progress(done, total)` is told in bytes of the file.
    ///
    /// # Errors
    /// `Closed` when `progress` says to stop; a missing tensor, one of another shape, one that the architecture has no place for.
    pub fn load(device: &D, arch: Arch, weights: Arc<Weights>, progress: Progress) -> Result<Self> {
        let mut loader = Loader {
            device,
            arch: &arch,
            weights: &weights,
            used: HashSet::new(),
        };
        let (vocab, hidden) = (arch.vocab_size, arch.hidden_size);
        let embedding = loader.tensor(None, "token_embd.weight", vocab, hidden)?;
        let total = weights.total_bytes();
        let steps = arch.layers.len() as u64 + 1;
        let report = |done: u64| match progress(done, total) {
            true => Ok(()),
            false => Err(Error::Closed),
        };
        report(0)?;
        let mut layers = Vec::with_capacity(arch.layers.len());
        for i in 0..arch.layers.len() {
            layers.push(loader.layer(i)?);
            report(total * (i as u64 + 1) / steps)?;
        }
        let output_norm = loader.norm(None, "output_norm.weight", hidden)?;
        let output = match arch.tied {
            true => {
                let output = device.matrix(&[embedding], None)?;
                embedding.forget(0..embedding.data.len());
                output
            }
            false => loader.matrix(None, &[("output", vocab)], hidden, false)?,
        };
        loader.check_all_used()?;
        report(total)?;
        let embedding = arch.tensor_name(None, "token_embd.weight");
        Ok(Self {
            arch,
            weights,
            embedding,
            layers,
            output_norm,
            output,
        })
    }
}

/// Activations of a step, kept for the next one.
struct Workspace<D: Device> {
    embedded: Vec<f32>,
    x: D::Buffer,
    normed: D::Buffer,
    qkv: D::Buffer,
    attended: D::Buffer,
    y: D::Buffer,
    gated: D::Buffer,
    last: D::Buffer,
    wanted: Wanted,
    logits: Vec<f32>,
}

/// A resident model with a device's threads, its workspace and a cache.
pub struct Decoder<D: Device> {
    device: D,
    model: Arc<Resident<D>>,
    cache: D::Cache,
    work: Workspace<D>,
}

impl<D: Device> Decoder<D> {
    /// With room for `pages` pages of keys and values.
    pub fn new(device: D, model: Arc<Resident<D>>, pages: usize) -> Result<Self> {
        let cache = device.cache(pages, &attention_shapes(&model.arch))?;
        let work = Workspace {
            embedded: Vec::new(),
            x: D::Buffer::default(),
            normed: D::Buffer::default(),
            qkv: D::Buffer::default(),
            attended: D::Buffer::default(),
            y: D::Buffer::default(),
            gated: D::Buffer::default(),
            last: D::Buffer::default(),
            wanted: Wanted::default(),
            logits: Vec::new(),
        };
        Ok(Self {
            device,
            model,
            cache,
            work,
        })
    }
}

impl<D: Device> Forward for Decoder<D> {
    fn vocab_size(&self) -> usize {
        self.model.arch.vocab_size
    }

    fn page_bytes(&self) -> Option<usize> {
        D::page_bytes(&self.cache)
    }

    fn read_page(&self, page: u32, out: &mut Vec<u8>) {
        D::read_page(&self.cache, page, out);
    }

    fn write_page(&mut self, page: u32, bytes: &[u8]) {
        D::write_page(&mut self.cache, page, bytes);
    }

    fn forward(&mut self, batch: &Batch, caller: &mut dyn Caller) -> Result<&[f32]> {
        let Self {
            device,
            model,
            cache,
            work: w,
        } = self;
        let arch = &model.arch;
        device.begin(batch, &arch.ropes)?;
        embed(model, batch, &mut w.embedded)?;
        device.upload(&w.embedded, arch.hidden_size, &mut w.x)?;
        for (i, layer) in model.layers.iter().enumerate() {
            if caller.gone() {
                return Ok(&[]);
            }
            device.norm(
                &w.x,
                &layer.attn_norm,
                arch.norm_eps,
                Some(&layer.qkv),
                &mut w.normed,
            )?;
            device.linear(&layer.qkv, &w.normed, &mut w.qkv)?;
            let last = i + 1 == model.layers.len();
            device.attention(
                i,
                &layer.attention,
                batch,
                &mut w.qkv,
                cache,
                last,
                &mut w.attended,
            )?;
            if last {
                // Nobody reads the other rows: their keys and values were what was wanted of them.
                if batch.outputs.is_empty() {
                    return Ok(&[]);
                }
                device.rows(&w.x, &batch.outputs, &mut w.last)?;
                std::mem::swap(&mut w.x, &mut w.last);
            }
            let residual = Residual {
                x: &mut w.x,
                y: &mut w.y,
                normed: &mut w.normed,
            };
            let norm = layer.post_attn_norm.as_ref().map(|n| (n, arch.norm_eps));
            add_product(device, &layer.attn_output, &w.attended, norm, residual)?;
            device.norm(
                &w.x,
                &layer.ffn_norm,
                arch.norm_eps,
                Some(&layer.gate_up),
                &mut w.normed,
            )?;
            device.gated(arch.activation, &layer.gate_up, &w.normed, &mut w.gated)?;
            let residual = Residual {
                x: &mut w.x,
                y: &mut w.y,
                normed: &mut w.normed,
            };
            let norm = layer.post_ffn_norm.as_ref().map(|n| (n, arch.norm_eps));
            add_product(device, &layer.ffn_down, &w.gated, norm, residual)?;
        }
        device.norm(
            &w.x,
            &model.output_norm,
            arch.norm_eps,
            Some(&model.output),
            &mut w.normed,
        )?;
        let wanted = w.wanted.few(batch.outputs.len(), arch.vocab_size, caller);
        let softcap = arch.logit_softcap;
        device.logits(&model.output, &w.normed, wanted, softcap, &mut w.logits)?;
        Ok(&w.logits)
    }
}

/// The part of the head that a step needs.
#[derive(Default)]
struct Wanted {
    /// What any row allows, a bit for each token.
    tokens: Vec<u32>,
    tiles: Vec<u32>,
}

impl Wanted {
    /// The head's tiles that hold a token which any of the `rows` allows, where they are fewer than half of them. One row
    /// that allows all asks for the whole head: the others then cost little more, since its weights are read in any case.
    fn few(&mut self, rows: usize, vocab: usize, caller: &mut dyn Caller) -> Option<&[u32]> {
        self.tokens.clear();
        for row in 0..rows {
            let of_row = caller.allowed(row)?;
            let words = self.tokens.len().max(of_row.len());
            self.tokens.resize(words, 0);
            for (all, word) in self.tokens.iter_mut().zip(of_row) {
                *all |= word;
            }
        }
        const PER_WORD: usize = u32::BITS as usize / TILE;
        let total = vocab.div_ceil(TILE);
        self.tiles.clear();
        for (i, word) in self.tokens.iter().enumerate() {
            let holds = |tile: &usize| word >> (tile % PER_WORD * TILE) & ((1 << TILE) - 1) != 0;
            let tiles = (i * PER_WORD..total.min((i + 1) * PER_WORD)).filter(holds);
            self.tiles.extend(tiles.map(|tile| tile as u32));
            if self.tiles.len() * 2 >= total {
                return None;
            }
        }
        Some(&self.tiles)
    }
}

/// What a residual addition touches: the stream, and room for the product and its norm.
struct Residual<'a, B> {
    x: &'a mut B,
    y: &'a mut B,
    normed: &'a mut B,
}

/// `x += by matrix^T`; or that normed, for families that norm what they add.
fn add_product<D: Device>(
    device: &mut D,
    matrix: &D::Matrix,
    by: &D::Buffer,
    norm: Option<(&D::Vector, f32)>,
    r: Residual<D::Buffer>,
) -> Result<()> {
    let Some((weight, eps)) = norm else {
        return device.linear_add(matrix, by, r.x);
    };
    device.linear(matrix, by, r.y)?;
    device.norm(r.y, weight, eps, None, r.normed)?;
    device.add(r.x, r.normed)
}

/// The tokens' rows of the embedding, dequantised from the file.
fn embed<D: Device>(model: &Resident<D>, batch: &Batch, out: &mut Vec<f32>) -> Result<()> {
    let width = model.arch.hidden_size;
    let table = model.weights.require(&model.embedding)?;
    out.resize(batch.tokens.len() * width, 0.0);
    for (&token, row) in batch.tokens.iter().zip(out.chunks_exact_mut(width)) {
        let token = token as usize;
        if token >= model.arch.vocab_size {
            let size = model.arch.vocab_size;
            return Err(Error::InvalidRequest(format!(
                "token id must be below {size}, got {token}"
            )));
        }
        table.dequantize_row(token, row);
        row.iter_mut()
            .for_each(|x| *x *= model.arch.embedding_scale);
    }
    Ok(())
}
