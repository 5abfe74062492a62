//! The one transformer, generic over its device: a batch of tokens in, logits out. Knows no request.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use hfcore_kernels::quant::TensorType;

use crate::adapter::{Adapter, Site};
use crate::arch::{Arch, Block, ExpertArch, LayerArch};
use crate::batch::{Adapted, Batch, Caller, Forward};
use crate::device::{AttentionLayer, AttentionShape, Device, HeadNorms, Norm, TILE};
use crate::error::{Error, Result};
use crate::weights::{Tensor, Weights};

/// Told `(done, total)` while a model is loaded; false stops it.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) -> bool + Sync);

/// A layer's weights on a device.
struct Layer<D: Device> {
    attn_norm: Option<Norm<D::Vector>>,
    qkv: D::Matrix,
    attention: AttentionLayer<D::Vector>,
    attn_output: D::Matrix,
    post_attn_norm: Option<Norm<D::Vector>>,
    /// None: it reads what attention reads, or the stream itself.
    ffn_norm: Option<Norm<D::Vector>>,
    ffn: FeedForward<D>,
    post_ffn_norm: Option<Norm<D::Vector>>,
}

enum FeedForward<D: Device> {
    Mlp(Mlp<D>),
    Experts(Experts<D>),
}

/// Two layers of a perceptron, the first maybe with gates.
struct Mlp<D: Device> {
    /// Gate and up as its two parts, or up alone.
    up: D::Matrix,
    gated: bool,
    down: D::Matrix,
}

/// Perceptrons of which a router chooses some for each row.
struct Experts<D: Device> {
    router: D::Matrix,
    arch: ExpertArch,
    experts: Vec<Mlp<D>>,
    /// One that always runs, and what says how much of it.
    shared: Option<(Mlp<D>, Option<D::Matrix>)>,
}

/// A model's weights on a device, shared by every decoder that runs it.
pub struct Resident<D: Device> {
    pub arch: Arch,
    weights: Arc<Weights>,
    /// Name of the embedding's tensor, read row by row from the file.
    embedding: String,
    /// The same of a table of positions.
    positions: Option<String>,
    layers: Vec<Layer<D>>,
    output_norm: Norm<D::Vector>,
    output: D::Matrix,
    /// Those that requests may name, by number.
    adapters: RwLock<Vec<Arc<Adapter<D>>>>,
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

    fn has(&self, layer: Option<usize>, name: &str) -> bool {
        let name = self.arch.tensor_name(layer, name);
        self.weights.tensors.contains_key(&name)
    }

    fn vector(&mut self, layer: Option<usize>, name: &str, width: usize) -> Result<Vec<f32>> {
        Ok(self.tensor(layer, name, 1, width)?.dequantize())
    }

    /// The norm `name`, whose weight and bias are multiplied by `scale`.
    fn scaled_norm(
        &mut self,
        layer: Option<usize>,
        name: &str,
        scale: f32,
    ) -> Result<Norm<D::Vector>> {
        let (arch, width) = (self.arch, self.arch.hidden_size);
        let mut weight = self.vector(layer, &format!("{name}.weight"), width)?;
        weight
            .iter_mut()
            .for_each(|x| *x = (*x + arch.norm_offset) * scale);
        let bias = format!("{name}.bias");
        let bias = match arch.layer_norm && self.has(layer, &bias) {
            true => Some(self.vector(layer, &bias, width)?),
            false => None,
        };
        let scaled = |bias: Vec<f32>| bias.into_iter().map(|x| x * scale).collect();
        Ok(Norm {
            weight: self.device.vector(weight)?,
            bias: bias.map(|b| self.device.vector(scaled(b))).transpose()?,
            eps: arch.norm_eps,
            centred: arch.layer_norm,
        })
    }

    fn norm(&mut self, layer: Option<usize>, name: &str) -> Result<Norm<D::Vector>> {
        self.scaled_norm(layer, name, 1.0)
    }

    /// The norm of `heads` heads: one weight for all of them, a row for each, or a tensor for each.
    fn head_norm(&mut self, layer: Option<usize>, name: &str, heads: usize) -> Result<D::Vector> {
        let (arch, dim) = (self.arch, self.arch.head_dim);
        let whole = format!("{name}.weight");
        let mut weight = Vec::with_capacity(heads * dim);
        if self.has(layer, &format!("{name}.0.weight")) {
            for head in 0..heads {
                weight.extend(self.vector(layer, &format!("{name}.{head}.weight"), dim)?);
            }
        } else {
            let found = self.weights.require(&arch.tensor_name(layer, &whole))?;
            match (found.elements() == dim && !arch.qk_together, found.shape) {
                (true, _) => {
                    let one = self.vector(layer, &whole, dim)?;
                    (0..heads).for_each(|_| weight.extend(&one));
                }
                (false, [_, _]) => weight = self.tensor(layer, &whole, heads, dim)?.dequantize(),
                (false, _) => weight = self.vector(layer, &whole, heads * dim)?,
            }
        }
        weight.iter_mut().for_each(|x| *x += arch.norm_offset);
        self.device.vector(weight)
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
            let weight = format!("{name}.weight");
            tensors.push(match self.arch.transposed && layer.is_some() {
                true => self.tensor(layer, &weight, inputs, outputs)?,
                false => self.tensor(layer, &weight, outputs, inputs)?,
            });
            let bias_name = format!("{name}.bias");
            if needs_bias || self.has(layer, &bias_name) {
                bias.extend(self.vector(layer, &bias_name, outputs)?);
                has_bias = true;
            } else {
                bias.extend(std::iter::repeat_n(0.0, outputs));
            }
        }
        let bias = has_bias.then_some(&bias[..]);
        if self.arch.transposed && layer.is_some() {
            return self.transposed(&tensors, 1, bias);
        }
        let matrix = self.device.matrix(&tensors, bias)?;
        // Now that they are resident twice, one of them may go.
        tensors.iter().for_each(|t| t.forget(0..t.data.len()));
        Ok(matrix)
    }

    /// Matrices that are stored as `[inputs, outputs]`; each becomes `parts` of them, of every `parts`-th output.
    fn transposed(
        &self,
        tensors: &[Tensor],
        parts: usize,
        bias: Option<&[f32]>,
    ) -> Result<D::Matrix> {
        let (mut shapes, mut data) = (Vec::new(), Vec::new());
        for tensor in tensors {
            let (inputs, outputs) = (tensor.rows(), tensor.cols());
            let size = self.element_size(tensor)?;
            let row = outputs * size;
            for part in 0..parts {
                let columns = (part..outputs).step_by(parts);
                shapes.push([columns.len(), inputs]);
                let mut turned = Vec::with_capacity(columns.len() * inputs * size);
                for column in columns {
                    for i in 0..inputs {
                        turned.extend_from_slice(&tensor.data[i * row + column * size..][..size]);
                    }
                }
                data.push((tensor.tensor_type, turned));
            }
        }
        let owned = shapes.iter().zip(&data);
        let owned: Vec<_> = owned
            .map(|(shape, (tensor_type, data))| Tensor::of(*tensor_type, shape, data))
            .collect();
        let matrix = self.device.matrix(&owned, bias)?;
        tensors.iter().for_each(|t| t.forget(0..t.data.len()));
        Ok(matrix)
    }

    /// Bytes of a number of a tensor that is not quantised.
    fn element_size(&self, tensor: &Tensor) -> Result<usize> {
        let kind = tensor.tensor_type;
        match kind.block_len() {
            1 => Ok(kind.block_bytes()),
            _ => Err(self.weights.problem(format!(
                "tensor {:?} of {} cannot be transposed",
                tensor.name,
                kind.name()
            ))),
        }
    }

    fn layer(&mut self, i: usize) -> Result<Layer<D>> {
        let (arch, at) = (self.arch, Some(i));
        let hidden = arch.hidden_size;
        let (q, kv) = (arch.heads * arch.head_dim, arch.kv_heads * arch.head_dim);
        let qkv: &[(&str, usize)] = match self.has(at, "attn_qkv.weight") {
            true => &[("attn_qkv", q + 2 * kv)],
            false => &[("attn_q", q), ("attn_k", kv), ("attn_v", kv)],
        };
        let norms = match arch.qk_norm {
            true => Some(HeadNorms {
                q: self.head_norm(at, "attn_q_norm", arch.heads)?,
                k: self.head_norm(at, "attn_k_norm", arch.kv_heads)?,
                eps: arch.norm_eps,
                centred: arch.layer_norm,
                together: arch.qk_together,
            }),
            false => None,
        };
        let sinks = match arch.sinks {
            true => {
                let sinks = self.vector(at, "attn_sinks.weight", arch.heads)?;
                Some(self.device.vector(sinks)?)
            }
            false => None,
        };
        let (before, after) = match arch.block {
            Block::Before => (true, false),
            Block::After => (false, true),
            Block::Around => (true, true),
            Block::Parallel => (true, false),
        };
        let norm = |this: &mut Self, wanted: bool, name: &str| match wanted {
            true => this.norm(at, name).map(Some),
            false => Ok(None),
        };
        Ok(Layer {
            attn_norm: norm(self, before, "attn_norm")?,
            qkv: self.matrix(at, qkv, hidden, arch.qkv_bias)?,
            attention: AttentionLayer {
                shape: attention_shape(arch, &arch.layers[i]),
                norms,
                sinks,
                rope: arch.layers[i].rope,
                pairing: arch.pairing,
            },
            attn_output: self.matrix(at, &[("attn_output", hidden)], q, false)?,
            post_attn_norm: norm(self, after, "post_attention_norm")?,
            ffn_norm: match before && arch.block != Block::Parallel {
                true => Some(self.ffn_norm(at)?),
                false => None,
            },
            ffn: match arch.experts.filter(|_| arch.layers[i].experts) {
                Some(experts) => FeedForward::Experts(self.experts(at, experts)?),
                None => FeedForward::Mlp(self.mlp(at, "", arch.intermediate_size)?),
            },
            post_ffn_norm: norm(self, after, "post_ffw_norm")?,
        })
    }

    /// GGUF files of gpt-oss call it what it follows.
    fn ffn_norm(&mut self, at: Option<usize>) -> Result<Norm<D::Vector>> {
        let own = self.has(at, "ffn_norm.weight") || self.arch.block != Block::Before;
        self.norm(
            at,
            if own {
                "ffn_norm"
            } else {
                "post_attention_norm"
            },
        )
    }

    /// The feed-forward whose tensors' names end so. Fused ones are one tensor: GGUF calls it `ffn_up`, transformers
    /// `gate_up_proj`.
    fn mlp(&mut self, at: Option<usize>, ending: &str, width: usize) -> Result<Mlp<D>> {
        let (hidden, gated) = (self.arch.hidden_size, self.arch.gated);
        let name = |stem: &str| format!("{stem}{ending}");
        let (gate, up, both) = (name("ffn_gate"), name("ffn_up"), name("ffn_gate_up"));
        let weight = |name: &str| format!("{name}.weight");
        let up = if !gated {
            self.matrix(at, &[(&up, width)], hidden, false)?
        } else if self.has(at, &weight(&both)) {
            self.halves(at, &weight(&both), width)?
        } else if self.has(at, &weight(&gate)) {
            self.matrix(at, &[(&gate, width), (&up, width)], hidden, false)?
        } else {
            self.halves(at, &weight(&up), width)?
        };
        let down = self.matrix(at, &[(&name("ffn_down"), hidden)], width, false)?;
        Ok(Mlp { up, gated, down })
    }

    /// Gate and up of one tensor.
    fn halves(&mut self, at: Option<usize>, name: &str, width: usize) -> Result<D::Matrix> {
        let both = self.tensor(at, name, 2 * width, self.arch.hidden_size)?;
        let matrix = self.device.matrix(&both.halves(), None)?;
        both.forget(0..both.data.len());
        Ok(matrix)
    }

    fn experts(&mut self, at: Option<usize>, arch: ExpertArch) -> Result<Experts<D>> {
        let (hidden, width) = (self.arch.hidden_size, arch.intermediate_size);
        let router = self.float_matrix(at, "ffn_gate_inp", arch.count, hidden)?;
        let numbered = self.has(at, "ffn_gate.0.weight");
        let mut experts = Vec::with_capacity(arch.count);
        for e in 0..arch.count {
            experts.push(match numbered {
                true => self.mlp(at, &format!(".{e}"), width)?,
                false => self.expert(at, e, &arch)?,
            });
        }
        let shared = match arch.shared_size {
            Some(width) => {
                let mlp = self.mlp(at, "_shexp", width)?;
                let gate = match self.has(at, "ffn_gate_inp_shexp.weight") {
                    true => Some(self.float_matrix(at, "ffn_gate_inp_shexp", 1, hidden)?),
                    false => None,
                };
                Some((mlp, gate))
            }
            None => None,
        };
        Ok(Experts {
            router,
            arch,
            experts,
            shared,
        })
    }

    /// Expert `e` of tensors that hold all of them, `[experts, outputs, inputs]`.
    fn expert(&mut self, at: Option<usize>, e: usize, arch: &ExpertArch) -> Result<Mlp<D>> {
        let (hidden, width, gated) = (self.arch.hidden_size, arch.intermediate_size, true);
        let both = "ffn_gate_up_exps";
        let fused = self.has(at, &format!("{both}.weight"));
        let up = match fused || self.packed_name(at, both, "_blocks").1 {
            true => self.expert_matrix(at, &[both], e, arch, (2 * width, hidden))?,
            false => {
                let parts = ["ffn_gate_exps", "ffn_up_exps"];
                self.expert_matrix(at, &parts, e, arch, (width, hidden))?
            }
        };
        let down = self.expert_matrix(at, &["ffn_down_exps"], e, arch, (hidden, width))?;
        Ok(Mlp { up, gated, down })
    }

    /// Expert `e`'s part of some tensors, each of `(outputs, inputs)` for one expert. A tensor with gates and inputs
    /// becomes two: its halves; or, of a family with sinks (gpt-oss), whose tensors lie transposed, every second row.
    fn expert_matrix(
        &mut self,
        at: Option<usize>,
        names: &[&str],
        e: usize,
        arch: &ExpertArch,
        (outputs, inputs): (usize, usize),
    ) -> Result<D::Matrix> {
        let both = names == ["ffn_gate_up_exps"];
        if let [name] = names
            && self.arch.turned_experts()
            && self.packed_name(at, name, "_blocks").1
        {
            return self.packed_expert(at, name, e, arch, (outputs, inputs));
        }
        let mut parts = Vec::new();
        let mut bias = Vec::new();
        let mut turned = false;
        for name in names {
            let weight = self.arch.tensor_name(at, &format!("{name}.weight"));
            let found = self.weights.require(&weight)?;
            let plain = [arch.count, outputs, inputs];
            turned = self.arch.turned_experts();
            let wanted = if turned {
                [arch.count, inputs, outputs]
            } else {
                plain
            };
            if found.shape != wanted {
                let got = found.shape;
                return Err(self
                    .weights
                    .problem(format!("tensor {weight:?} is {got:?}, wanted {wanted:?}")));
            }
            self.used.insert(weight);
            let rows = wanted[1];
            parts.push(found.slice(e * rows, rows));
            let name = format!("{name}.bias");
            if self.has(at, &name) {
                let all = self.tensor(at, &name, arch.count, outputs)?;
                bias.extend(all.slice(e, 1).dequantize());
            }
        }
        if both && turned {
            // Gates and inputs lie side by side in pairs.
            let of = |first: usize| bias.iter().copied().skip(first).step_by(2);
            bias = of(0).chain(of(1)).collect();
        }
        let bias = (!bias.is_empty()).then_some(&bias[..]);
        if bias.is_some_and(|b| b.len() != parts.len() * outputs) {
            return Err(self
                .weights
                .problem("some experts' tensors lack their biases"));
        }
        if turned {
            return self.transposed(&parts, if both { 2 } else { 1 }, bias);
        }
        let halves = both.then(|| parts[0].halves());
        let matrix = self
            .device
            .matrix(halves.as_ref().map_or(&parts, |h| &h[..]), bias)?;
        parts.iter().for_each(|t| t.forget(0..t.data.len()));
        Ok(matrix)
    }

    /// The name of a packed tensor's part, and whether there is one.
    fn packed_name(&self, at: Option<usize>, name: &str, part: &str) -> (String, bool) {
        let name = self.arch.tensor_name(at, &format!("{name}.weight")) + part;
        let there = self.weights.packed.contains_key(&name);
        (name, there)
    }

    /// Expert `e`'s part of a tensor in MXFP4: `_blocks` of `[experts, outputs, inputs / 32, 16]` bytes with two numbers each,
    /// one after the other, and `_scales` (OCP Microscaling Formats 1.0). Of gates and inputs, every second row.
    fn packed_expert(
        &mut self,
        at: Option<usize>,
        name: &str,
        e: usize,
        arch: &ExpertArch,
        (outputs, inputs): (usize, usize),
    ) -> Result<D::Matrix> {
        let each = inputs / 32;
        let mut parts = Vec::new();
        for (part, own) in [("_blocks", &[16][..]), ("_scales", &[])] {
            let (full, _) = self.packed_name(at, name, part);
            let wanted = [&[arch.count, outputs, each], own].concat();
            match self.weights.packed(&full) {
                Some((shape, data)) if shape == wanted && inputs == each * 32 => {
                    let bytes = data.len() / arch.count;
                    parts.push(&data[e * bytes..(e + 1) * bytes]);
                }
                found => {
                    let got = found.map(|(shape, _)| shape);
                    return Err(self
                        .weights
                        .problem(format!("tensor {full:?} is {got:?}, wanted {wanted:?}")));
                }
            }
            self.used.insert(full);
        }
        let bias_name = format!("{name}.bias");
        let bias = self.tensor(at, &bias_name, arch.count, outputs)?;
        let bias = bias.slice(e, 1).dequantize();
        let step = if name == "ffn_gate_up_exps" { 2 } else { 1 };
        let rows = |first: usize| (first..outputs).step_by(step);
        let order: Vec<usize> = (0..step).flat_map(rows).collect();
        let bias: Vec<f32> = order.iter().map(|row| bias[*row]).collect();
        let mut blocks = Vec::with_capacity(outputs * each * 17);
        for row in &order {
            for at in row * each..(row + 1) * each {
                blocks.push(parts[1][at]);
                // GGUF's order: the numbers of the first half beside those of the second.
                let pairs = &parts[0][at * 16..(at + 1) * 16];
                let number = |i: usize| pairs[i / 2] >> (i % 2 * 4) & 15;
                blocks.extend((0..16).map(|i| number(i) | number(i + 16) << 4));
            }
        }
        let shape = [outputs, inputs];
        let matrix = Tensor::of(TensorType::MXFP4, &shape, &blocks);
        let halves = matrix.halves();
        let whole = [matrix];
        let parts = if step == 2 { &halves[..] } else { &whole };
        self.device.matrix(parts, Some(&bias))
    }

    /// A small matrix whose products choose: never rounded.
    fn float_matrix(
        &mut self,
        at: Option<usize>,
        name: &str,
        outputs: usize,
        inputs: usize,
    ) -> Result<D::Matrix> {
        let weight = self.tensor(at, &format!("{name}.weight"), outputs, inputs)?;
        let values = weight.dequantize();
        let bytes: Vec<u8> = values.iter().flat_map(|x| x.to_le_bytes()).collect();
        let bias = format!("{name}.bias");
        let bias = match self.has(at, &bias) {
            true => Some(self.vector(at, &bias, outputs)?),
            false => None,
        };
        let shape = [outputs, inputs];
        let matrix = Tensor::of(TensorType::F32, &shape, &bytes);
        self.device.matrix(&[matrix], bias.as_deref())
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
                // gpt2's masks.
                || name.ends_with(".attn.bias")
                || name.ends_with(".attn.masked_bias")
                || name == self.arch.tensor_name(None, "output.weight")
        };
        let mut unused: Vec<_> = self
            .weights
            .tensors
            .keys()
            .chain(self.weights.packed.keys())
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
        let positions = match arch.learned_positions {
            true => {
                let name = "position_embd.weight";
                loader.tensor(None, name, arch.context_size, hidden)?;
                Some(arch.tensor_name(None, name))
            }
            false => None,
        };
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
        let output_norm = loader.scaled_norm(None, "output_norm", arch.logit_scale)?;
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
            positions,
            layers,
            output_norm,
            output,
            adapters: RwLock::default(),
        })
    }

    /// Make the adapter in a directory resident; its number.
    ///
    /// # Errors
    /// Those of [`Adapter::load`]; `InvalidRequest` where there are too many.
    pub fn adapt(&self, device: &D, dir: &Path) -> Result<u32> {
        let adapter = Arc::new(Adapter::load(device, &self.arch, dir)?);
        let mut all = self
            .adapters
            .write()
            .unwrap_or_else(PoisonError::into_inner);
        if all.len() >= MAX_ADAPTERS {
            return Err(Error::InvalidRequest(format!(
                "at most {MAX_ADAPTERS} adapters can be loaded at a time"
            )));
        }
        all.push(adapter);
        Ok(all.len() as u32 - 1)
    }

    /// The adapters of a step, with their rows.
    fn adapters_of(&self, batch: &Batch) -> Result<Vec<(Arc<Adapter<D>>, Adapted)>> {
        if batch.adapters.iter().all(Option::is_none) {
            return Ok(Vec::new());
        }
        let all = self.adapters.read().unwrap_or_else(PoisonError::into_inner);
        let find = |rows: Adapted| match all.get(rows.adapter as usize) {
            Some(adapter) => Ok((adapter.clone(), rows)),
            None => Err(Error::Internal(format!(
                "adapter {} of {}",
                rows.adapter,
                all.len()
            ))),
        };
        batch.adapted().into_iter().map(find).collect()
    }
}

/// Fewer than beginnings of prefixes.
const MAX_ADAPTERS: usize = 1024;

/// What the adapters of a step add to its matrices.
struct Additions<'a, D: Device> {
    adapters: &'a [(Arc<Adapter<D>>, Adapted)],
    batch: &'a Batch,
    layer: usize,
    /// The rows are those of the outputs alone.
    outputs_only: bool,
}

impl<D: Device> Additions<'_, D> {
    fn any(&self, site: Site) -> bool {
        let mut adapters = self.adapters.iter();
        adapters.any(|(adapter, _)| adapter.pair(self.layer, site).is_some())
    }

    /// `y[row] += B (A x[row])` for the rows of each adapter that knows the site. A row's bits do not depend on the others.
    fn add(
        &self,
        device: &mut D,
        site: Site,
        x: &D::Buffer,
        y: &mut D::Buffer,
        thin: &mut Thin<D>,
    ) -> Result<()> {
        for (adapter, adapted) in self.adapters {
            let (rows, all) = match self.outputs_only && site != Site::Qkv {
                true => (&adapted.outputs, self.batch.outputs.len()),
                false => (&adapted.rows, self.batch.tokens.len()),
            };
            let Some(pair) = adapter.pair(self.layer, site).filter(|_| !rows.is_empty()) else {
                continue;
            };
            if rows.len() == all {
                device.linear(&pair.a, x, &mut thin.low)?;
                device.linear(&pair.b, &thin.low, &mut thin.high)?;
                device.add(y, &thin.high, 1.0)?;
                continue;
            }
            thin.to.clear();
            thin.to.extend(rows.iter().map(|row| (*row, 1.0)));
            device.rows(x, rows, &mut thin.rows)?;
            device.linear(&pair.a, &thin.rows, &mut thin.low)?;
            device.linear(&pair.b, &thin.low, &mut thin.high)?;
            device.add_rows(y, &thin.high, &thin.to)?;
        }
        Ok(())
    }
}

/// Room for what adapters compute.
struct Thin<D: Device> {
    rows: D::Buffer,
    low: D::Buffer,
    high: D::Buffer,
    to: Vec<(u32, f32)>,
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
    routed: Routed<D>,
    thin: Thin<D>,
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
            routed: Routed {
                scores: D::Buffer::default(),
                rows: D::Buffer::default(),
                values: Vec::new(),
                chosen: Vec::new(),
                numbers: Vec::new(),
            },
            thin: Thin {
                rows: D::Buffer::default(),
                low: D::Buffer::default(),
                high: D::Buffer::default(),
                to: Vec::new(),
            },
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
        let adapters = model.adapters_of(batch)?;
        device.begin(batch, &arch.ropes)?;
        embed(model, batch, &mut w.embedded)?;
        device.upload(&w.embedded, arch.hidden_size, &mut w.x)?;
        for (i, layer) in model.layers.iter().enumerate() {
            if caller.gone() {
                return Ok(&[]);
            }
            let qkv = Some(&layer.qkv);
            let read = match &layer.attn_norm {
                Some(norm) => {
                    device.norm(&w.x, norm, qkv, &mut w.normed)?;
                    &w.normed
                }
                None => &w.x,
            };
            let last = i + 1 == model.layers.len();
            let more = Additions {
                adapters: &adapters,
                batch,
                layer: i,
                outputs_only: last,
            };
            device.linear(&layer.qkv, read, &mut w.qkv)?;
            more.add(device, Site::Qkv, read, &mut w.qkv, &mut w.thin)?;
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
                if arch.block == Block::Parallel {
                    device.rows(&w.normed, &batch.outputs, &mut w.last)?;
                    std::mem::swap(&mut w.normed, &mut w.last);
                }
            }
            let norm = layer.post_attn_norm.as_ref();
            add_product(
                device,
                &layer.attn_output,
                arch,
                norm,
                AddTo {
                    by: &w.attended,
                    x: &mut w.x,
                    y: &mut w.y,
                    normed: &mut w.normed,
                    thin: &mut w.thin,
                },
                (&more, Site::AttnOutput),
            )?;
            feed_forward(device, arch, layer, w, &more)?;
        }
        device.norm(&w.x, &model.output_norm, Some(&model.output), &mut w.normed)?;
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

/// What a residual addition touches: what is multiplied, the stream, and room for the product and its norm.
struct AddTo<'a, D: Device> {
    by: &'a D::Buffer,
    x: &'a mut D::Buffer,
    y: &'a mut D::Buffer,
    normed: &'a mut D::Buffer,
    thin: &'a mut Thin<D>,
}

/// `x += by matrix^T`; or that normed, or scaled, for families that do so to what they add.
fn add_product<D: Device>(
    device: &mut D,
    matrix: &D::Matrix,
    arch: &Arch,
    norm: Option<&Norm<D::Vector>>,
    r: AddTo<D>,
    (more, site): (&Additions<D>, Site),
) -> Result<()> {
    if norm.is_none() && arch.residual_scale == 1.0 {
        device.linear_add(matrix, r.by, r.x)?;
        return more.add(device, site, r.by, r.x, r.thin);
    }
    device.linear(matrix, r.by, r.y)?;
    more.add(device, site, r.by, r.y, r.thin)?;
    let Some(norm) = norm else {
        return device.add(r.x, r.y, arch.residual_scale);
    };
    device.norm(r.y, norm, None, r.normed)?;
    device.add(r.x, r.normed, arch.residual_scale)
}

/// A layer's second half: of the stream, normed; or of what attention read.
fn feed_forward<D: Device>(
    device: &mut D,
    arch: &Arch,
    layer: &Layer<D>,
    w: &mut Workspace<D>,
    more: &Additions<D>,
) -> Result<()> {
    let mlp = match &layer.ffn {
        FeedForward::Mlp(mlp) => mlp,
        FeedForward::Experts(experts) => {
            // Where there is none, attention's still stands there: the blocks are parallel.
            if let Some(norm) = &layer.ffn_norm {
                device.norm(&w.x, norm, None, &mut w.normed)?;
            }
            return run_experts(device, arch, experts, w);
        }
    };
    let read = match &layer.ffn_norm {
        Some(norm) => {
            device.norm(&w.x, norm, Some(&mlp.up), &mut w.normed)?;
            &w.normed
        }
        None if arch.block == Block::Parallel => &w.normed,
        None => &w.x,
    };
    if more.any(Site::Up) {
        device.linear(&mlp.up, read, &mut w.y)?;
        more.add(device, Site::Up, read, &mut w.y, &mut w.thin)?;
        device.activate(arch.activation, mlp.gated, &w.y, &mut w.gated)?;
    } else {
        first_half(device, arch, mlp, read, &mut w.gated)?;
    }
    add_product(
        device,
        &mlp.down,
        arch,
        layer.post_ffn_norm.as_ref(),
        AddTo {
            by: &w.gated,
            x: &mut w.x,
            y: &mut w.y,
            normed: &mut w.normed,
            thin: &mut w.thin,
        },
        (more, Site::Down),
    )
}

/// What a feed-forward's second matrix reads.
fn first_half<D: Device>(
    device: &mut D,
    arch: &Arch,
    mlp: &Mlp<D>,
    x: &D::Buffer,
    out: &mut D::Buffer,
) -> Result<()> {
    match mlp.gated {
        true => device.gated(arch.activation, &mlp.up, x, out),
        false => device.activated(arch.activation, &mlp.up, x, out),
    }
}

/// Who goes to which expert, kept for the next step.
struct Routed<D: Device> {
    scores: D::Buffer,
    /// The rows of one expert.
    rows: D::Buffer,
    values: Vec<f32>,
    /// For each expert its rows, with their shares.
    chosen: Vec<Vec<(u32, f32)>>,
    numbers: Vec<u32>,
}

/// Add to the stream what the experts make of `w.normed`: each reads its rows together, in the order of the experts, so
/// that a row's sum has one order whoever its neighbours are.
fn run_experts<D: Device>(
    device: &mut D,
    arch: &Arch,
    experts: &Experts<D>,
    w: &mut Workspace<D>,
) -> Result<()> {
    let r = &mut w.routed;
    device.linear(&experts.router, &w.normed, &mut r.scores)?;
    device.read(&r.scores, &mut r.values)?;
    route(&experts.arch, &r.values, arch.residual_scale, &mut r.chosen);
    for (mlp, chosen) in experts.experts.iter().zip(&r.chosen) {
        if chosen.is_empty() {
            continue;
        }
        r.numbers.clear();
        r.numbers.extend(chosen.iter().map(|(row, _)| row));
        device.rows(&w.normed, &r.numbers, &mut r.rows)?;
        first_half(device, arch, mlp, &r.rows, &mut w.gated)?;
        device.linear(&mlp.down, &w.gated, &mut w.y)?;
        device.add_rows(&mut w.x, &w.y, chosen)?;
    }
    let Some((mlp, gate)) = &experts.shared else {
        return Ok(());
    };
    first_half(device, arch, mlp, &w.normed, &mut w.gated)?;
    device.linear(&mlp.down, &w.gated, &mut w.y)?;
    let Some(gate) = gate else {
        return device.add(&mut w.x, &w.y, arch.residual_scale);
    };
    device.linear(gate, &w.normed, &mut r.scores)?;
    device.read(&r.scores, &mut r.values)?;
    let share = |x: &f32| arch.residual_scale / (1.0 + (-x).exp());
    let shares: Vec<_> = (0..).zip(r.values.iter().map(share)).collect();
    device.add_rows(&mut w.x, &w.y, &shares)
}

/// Which rows each expert gets, and with what share times `scale`: of the softmax over all experts, the largest (the first
/// of equal ones), made to add up to one where the family does so.
fn route(arch: &ExpertArch, scores: &[f32], scale: f32, chosen: &mut Vec<Vec<(u32, f32)>>) {
    chosen.resize_with(arch.count, Vec::new);
    chosen.iter_mut().for_each(Vec::clear);
    let mut order: Vec<usize> = Vec::with_capacity(arch.count);
    for (row, scores) in (0..).zip(scores.chunks_exact(arch.count)) {
        order.clear();
        order.extend(0..arch.count);
        order.sort_by(|&a, &b| scores[b].total_cmp(&scores[a]));
        let best = scores[order[0]];
        let weight = |e: &usize| (scores[*e] - best).exp();
        order[arch.used..].sort_unstable();
        let among = match arch.normalised {
            true => &order[..arch.used],
            false => &order[..],
        };
        let sum: f32 = among.iter().map(weight).sum();
        for e in &order[..arch.used] {
            chosen[*e].push((row, scale * weight(e) / sum));
        }
    }
}

/// The tokens' rows of the embedding, dequantised from the file.
fn embed<D: Device>(model: &Resident<D>, batch: &Batch, out: &mut Vec<f32>) -> Result<()> {
    let width = model.arch.hidden_size;
    let table = model.weights.require(&model.embedding)?;
    let positions = match &model.positions {
        Some(name) => Some(model.weights.require(name)?),
        None => None,
    };
    let mut position = vec![0.0; if positions.is_some() { width } else { 0 }];
    out.resize(batch.tokens.len() * width, 0.0);
    let rows = batch.tokens.iter().zip(&batch.positions);
    for ((&token, &at), row) in rows.zip(out.chunks_exact_mut(width)) {
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
        if let Some(positions) = &positions {
            let at = at as usize;
            if at >= positions.rows() {
                let limit = positions.rows();
                return Err(Error::ContextOverflow {
                    prompt: at + 1,
                    limit,
                });
            }
            positions.dequantize_row(at, &mut position);
            row.iter_mut().zip(&position).for_each(|(x, p)| *x += p);
        }
    }
    Ok(())
}
