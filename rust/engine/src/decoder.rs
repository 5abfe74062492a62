//! The one transformer, generic over its device: a batch of tokens in, logits out. Knows no request.

mod latent;
mod load;

use std::path::Path;
use std::sync::{Arc, PoisonError, RwLock};

use crate::adapter::{Adapter, Site};
use crate::arch::{Arch, Block, ExpertArch, Groups, LayerArch};
use crate::batch::{Adapted, Batch, Caller, Forward};
use crate::device::{AttentionLayer, AttentionShape, Convolution, Device, Norm, TILE};
use crate::error::{Error, Result};
use crate::weights::Weights;

use hfcore_kernels::elementwise::Activation;
use latent::Latent;

/// Told `(done, total)` while a model is loaded; false stops it.
pub type Progress<'a> = &'a (dyn Fn(u64, u64) -> bool + Sync);

/// A layer's weights on a device.
struct Layer<D: Device> {
    attn_norm: Option<Norm<D::Vector>>,
    mixer: Mixer<D>,
    attn_output: D::Matrix,
    post_attn_norm: Option<Norm<D::Vector>>,
    /// None: it reads what attention reads, or the stream itself.
    ffn_norm: Option<Norm<D::Vector>>,
    ffn: FeedForward<D>,
    post_ffn_norm: Option<Norm<D::Vector>>,
}

/// What looks at other positions.
enum Mixer<D: Device> {
    Attention {
        qkv: D::Matrix,
        layer: AttentionLayer<D::Vector>,
    },
    Latent(Latent<D>),
    Convolution {
        input: D::Matrix,
        layer: Convolution<D::Vector>,
    },
}

impl<D: Device> Mixer<D> {
    /// The matrix that reads what it is given.
    fn first(&self) -> &D::Matrix {
        match self {
            Self::Attention { qkv, .. } => qkv,
            Self::Latent(latent) => latent.first(),
            Self::Convolution { input, .. } => input,
        }
    }
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
    activation: Activation,
    down: D::Matrix,
}

/// Perceptrons of which a router chooses some for each row.
struct Experts<D: Device> {
    router: D::Matrix,
    /// Added to the experts' scores where they are compared, not to their shares; empty where there is none.
    bias: Vec<f32>,
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
    /// None: it makes vectors, no logits.
    output: Option<D::Matrix>,
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
    if layer.convolution {
        return Convolution::<()>::shape(arch.hidden_size);
    }
    AttentionShape {
        heads: arch.heads,
        kv_heads: arch.kv_heads,
        head_dim: arch.head_dim,
        scale: arch.attention_scale,
        softcap: arch.attention_softcap,
        window: layer.window,
        both_ways: arch.both_ways,
    }
}

impl<D: Device> Resident<D> {
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
    latent: latent::Room<D>,
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
    /// All layers use the first one's keys and values, one after the other.
    one_cache: bool,
    work: Workspace<D>,
}

impl<D: Device> Decoder<D> {
    /// With room for `pages` pages of keys and values.
    pub fn new(device: D, model: Arc<Resident<D>>, pages: usize) -> Result<Self> {
        let mut shapes = attention_shapes(&model.arch);
        let size = |shape: &AttentionShape| (shape.kv_heads, shape.head_dim);
        let alike = shapes.iter().all(|shape| size(shape) == size(&shapes[0]));
        // Sequences run whole then: no layer's keys and values are wanted when it is done.
        let one_cache = model.output.is_none() && alike;
        if one_cache {
            shapes.truncate(1);
        }
        let cache = device.cache(pages, &shapes)?;
        let work = Workspace {
            embedded: Vec::new(),
            x: D::Buffer::default(),
            normed: D::Buffer::default(),
            qkv: D::Buffer::default(),
            attended: D::Buffer::default(),
            y: D::Buffer::default(),
            gated: D::Buffer::default(),
            last: D::Buffer::default(),
            latent: latent::Room::default(),
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
            one_cache,
            work,
        })
    }
}

impl<D: Device> Decoder<D> {
    /// The vectors of `batch.outputs` after the last norm, `[outputs, hidden_size]`, of whole sequences.
    pub fn vectors(&mut self, batch: &Batch, out: &mut Vec<f32>) -> Result<()> {
        out.clear();
        match self.run(batch, &mut ())? {
            true => self.device.read(&self.work.normed, out),
            false => Ok(()),
        }
    }

    /// Run the layers, and norm the rows of `batch.outputs` for the head; whether there are any, and they are wanted.
    fn run(&mut self, batch: &Batch, caller: &mut dyn Caller) -> Result<bool> {
        let Self {
            device,
            model,
            cache,
            one_cache,
            work: w,
        } = self;
        let arch = &model.arch;
        let adapters = model.adapters_of(batch)?;
        device.begin(batch, &arch.ropes)?;
        embed(model, batch, &mut w.embedded)?;
        device.upload(&w.embedded, arch.hidden_size, &mut w.x)?;
        for (i, layer) in model.layers.iter().enumerate() {
            if caller.gone() {
                return Ok(false);
            }
            let first = Some(layer.mixer.first());
            let read = match &layer.attn_norm {
                Some(norm) => {
                    device.norm(&w.x, norm, first, &mut w.normed)?;
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
            let (qkv, attended) = (&mut w.qkv, &mut w.attended);
            let place = if *one_cache { 0 } else { i };
            match &layer.mixer {
                Mixer::Attention { qkv: matrix, layer } => {
                    device.linear(matrix, read, qkv)?;
                    more.add(device, Site::Qkv, read, qkv, &mut w.thin)?;
                    if let Some(limit) = arch.qkv_limit {
                        device.clamp(qkv, limit)?;
                    }
                    device.attention(place, layer, batch, qkv, cache, last, attended)?;
                }
                Mixer::Latent(latent) => {
                    let place = (place, batch, last);
                    latent.run(device, place, read, cache, &mut w.latent, qkv, attended)?;
                }
                Mixer::Convolution { input, layer } => {
                    device.linear(input, read, qkv)?;
                    device.convolve(place, layer, batch, qkv, cache, last, attended)?;
                }
            }
            if last {
                // Nobody reads the other rows: their keys and values were what was wanted of them.
                if batch.outputs.is_empty() {
                    return Ok(false);
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
        device.norm(
            &w.x,
            &model.output_norm,
            model.output.as_ref(),
            &mut w.normed,
        )?;
        Ok(true)
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
        if !self.run(batch, caller)? {
            return Ok(&[]);
        }
        let Self {
            device,
            model,
            work: w,
            ..
        } = self;
        let arch = &model.arch;
        let Some(head) = &model.output else {
            return Err(Error::Internal("logits of a model without a head".into()));
        };
        let wanted = w.wanted.few(batch.outputs.len(), arch.vocab_size, caller);
        let softcap = arch.logit_softcap;
        device.logits(head, &w.normed, wanted, softcap, &mut w.logits)?;
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
            return run_experts(device, arch.residual_scale, experts, w);
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
        device.activate(mlp.activation, mlp.gated, &w.y, &mut w.gated)?;
    } else {
        first_half(device, mlp, read, &mut w.gated)?;
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
    mlp: &Mlp<D>,
    x: &D::Buffer,
    out: &mut D::Buffer,
) -> Result<()> {
    match mlp.gated {
        true => device.gated(mlp.activation, &mlp.up, x, out),
        false => device.activated(mlp.activation, &mlp.up, x, out),
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
    scale: f32,
    experts: &Experts<D>,
    w: &mut Workspace<D>,
) -> Result<()> {
    let r = &mut w.routed;
    device.linear(&experts.router, &w.normed, &mut r.scores)?;
    device.read(&r.scores, &mut r.values)?;
    let (of, bias) = (&experts.arch, &experts.bias);
    route(of, bias, &r.values, scale, &mut r.chosen);
    for (mlp, chosen) in experts.experts.iter().zip(&r.chosen) {
        if chosen.is_empty() {
            continue;
        }
        r.numbers.clear();
        r.numbers.extend(chosen.iter().map(|(row, _)| row));
        device.rows(&w.normed, &r.numbers, &mut r.rows)?;
        first_half(device, mlp, &r.rows, &mut w.gated)?;
        device.linear(&mlp.down, &w.gated, &mut w.y)?;
        device.add_rows(&mut w.x, &w.y, chosen)?;
    }
    let Some((mlp, gate)) = &experts.shared else {
        return Ok(());
    };
    first_half(device, mlp, &w.normed, &mut w.gated)?;
    device.linear(&mlp.down, &w.gated, &mut w.y)?;
    let Some(gate) = gate else {
        return device.add(&mut w.x, &w.y, scale);
    };
    device.linear(gate, &w.normed, &mut r.scores)?;
    device.read(&r.scores, &mut r.values)?;
    let share = |x: &f32| scale / (1.0 + (-x).exp());
    let shares: Vec<_> = (0..).zip(r.values.iter().map(share)).collect();
    device.add_rows(&mut w.x, &w.y, &shares)
}

/// Which rows each expert gets, and with what share times `scale`: those with the largest shares, their biases added (the
/// first of equal ones), of the best groups. Their shares are made to add up to one where the family does so.
fn route(
    arch: &ExpertArch,
    bias: &[f32],
    scores: &[f32],
    scale: f32,
    chosen: &mut Vec<Vec<(u32, f32)>>,
) {
    chosen.resize_with(arch.count, Vec::new);
    chosen.iter_mut().for_each(Vec::clear);
    let (mut shares, mut merits) = (Vec::with_capacity(arch.count), Vec::new());
    let mut order: Vec<usize> = Vec::with_capacity(arch.count);
    for (row, scores) in (0..).zip(scores.chunks_exact(arch.count)) {
        shares_of(arch.sigmoid, scores, &mut shares);
        merits.clone_from(&shares);
        merits.iter_mut().zip(bias).for_each(|(x, bias)| *x += bias);
        if let Some(groups) = &arch.groups {
            leave_groups(groups, arch.sigmoid, &mut merits);
        }
        order.clear();
        order.extend(0..arch.count);
        order.sort_by(|&a, &b| merits[b].total_cmp(&merits[a]));
        let best = &order[..arch.used];
        let sum = match arch.normalised {
            true => best.iter().map(|e| shares[*e]).sum::<f32>(),
            false => 1.0,
        };
        let scale = scale * arch.scale / sum.max(f32::MIN_POSITIVE);
        for e in best {
            chosen[*e].push((row, scale * shares[*e]));
        }
    }
}

/// The experts' shares of a row: each one's own, or parts of a whole.
fn shares_of(sigmoid: bool, scores: &[f32], shares: &mut Vec<f32>) {
    shares.clear();
    if sigmoid {
        return shares.extend(scores.iter().map(|x| 1.0 / (1.0 + (-x).exp())));
    }
    let largest = scores.iter().copied().fold(f32::NEG_INFINITY, f32::max);
    shares.extend(scores.iter().map(|x| (x - largest).exp()));
    let sum: f32 = shares.iter().sum();
    shares.iter_mut().for_each(|x| *x /= sum);
}

/// Take the experts of all but the best groups out of the choice. A group is as good as its best expert, or its best two
/// together (`two`).
fn leave_groups(groups: &Groups, two: bool, merits: &mut [f32]) {
    let size = (merits.len() / groups.count).max(1);
    let merit = |group: &[f32]| {
        let best = (f32::NEG_INFINITY, f32::NEG_INFINITY);
        let (first, second) = group
            .iter()
            .fold(best, |(first, second), &x| match x > first {
                true => (x, first),
                false => (first, second.max(x)),
            });
        if two { first + second } else { first }
    };
    let all: Vec<f32> = merits.chunks_exact(size).map(merit).collect();
    let mut order: Vec<usize> = (0..all.len()).collect();
    order.sort_by(|&a, &b| all[b].total_cmp(&all[a]));
    for left in order.iter().skip(groups.used) {
        merits[left * size..(left + 1) * size].fill(f32::NEG_INFINITY);
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

#[cfg(test)]
mod tests;
