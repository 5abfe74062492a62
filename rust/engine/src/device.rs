//! What a decoder asks of a device: some fused operations over rows of f32 activations. No model, no request.

use hfcore_kernels::elementwise::Activation;
use hfcore_kernels::elementwise::Pairing;
use hfcore_kernels::pool::Pool;

pub use hfcore_kernels::attention::{AttentionShape, KvType};
pub use hfcore_kernels::tile::TILE;

use crate::arch::Rope;
use crate::batch::Batch;
use crate::error::Result;
use crate::weights::Tensor;

/// One layer's attention: its shape, the norms of its heads, its positions.
pub struct AttentionLayer<V> {
    pub shape: AttentionShape,
    pub norms: Option<HeadNorms<V>>,
    /// A score for each head that takes its share of the weights and gives nothing.
    pub sinks: Option<V>,
    /// Added to scores by how far the key stands behind the query: `[heads][2 * reach]`, from `-reach` on, which is a
    /// multiple of a page; no position lies beyond it.
    pub distances: Option<V>,
    /// Which of the ropes given to [`Device::begin`]; `None`: no positions.
    pub rope: Option<usize>,
    pub pairing: Pairing,
}

/// Norms of queries and keys.
pub struct HeadNorms<V> {
    /// Weights of all heads' numbers, one head after the other.
    pub q: V,
    pub k: V,
    pub eps: f32,
    /// The mean is taken off first.
    pub centred: bool,
    /// All heads of a row are one vector.
    pub together: bool,
    /// They come after the rotation.
    pub last: bool,
}

/// A short convolution over positions, each number by itself, between two gates (LFM2). What it looks back at lies in
/// the cache as keys and values do, so that whatever shares or writes pages need not know of it.
pub struct Convolution<V> {
    pub width: usize,
    /// `[positions][width]`, the oldest position first, its own last.
    pub weight: V,
    pub positions: usize,
    pub bias: Option<V>,
}

impl<V> Convolution<V> {
    /// What the cache keeps of a position: `width` numbers, half of them as its key.
    pub fn shape(width: usize) -> AttentionShape {
        AttentionShape {
            heads: 1,
            kv_heads: 1,
            head_dim: width / 2,
            scale: 1.0,
            softcap: None,
            window: None,
            both_ways: false,
        }
    }
}

/// A norm of rows: RMSNorm, or LayerNorm where it is centred.
pub struct Norm<V> {
    pub weight: V,
    pub bias: Option<V>,
    pub eps: f32,
    pub centred: bool,
}

/// The operations. Buffers hold `[rows, width]` f32 activations and are reused from step to step: an operation gives its
/// `out` the shape it needs. Arguments have been checked by the decoder; a device reports only what it alone can meet.
pub trait Device: Send + Sized {
    /// A resident weight matrix, maybe of several parts side by side.
    type Matrix: Send + Sync;
    /// A resident vector: norm weights.
    type Vector: Send + Sync;
    type Buffer: Send + Default;
    /// Keys and values of all layers, in pages.
    type Cache: Send;

    /// The threads on which matrices are made the blocks that this device multiplies best; none: it wants their numbers as
    /// they are, in F32.
    fn packing(&self) -> Option<&Pool> {
        None
    }
    /// Make parts that share their inputs resident; their outputs lie side by side.
    fn matrix(&self, parts: &[Tensor], bias: Option<&[f32]>) -> Result<Self::Matrix>;
    fn vector(&self, values: Vec<f32>) -> Result<Self::Vector>;
    fn cache(&self, pages: usize, shapes: &[AttentionShape]) -> Result<Self::Cache>;
    /// Bytes of a page over all layers; none where pages do not leave the device.
    fn page_bytes(_cache: &Self::Cache) -> Option<usize> {
        None
    }
    /// Add a page's bytes to `out`.
    fn read_page(_cache: &Self::Cache, _page: u32, _out: &mut Vec<u8>) {}
    /// Overwrite a page with as many bytes.
    fn write_page(_cache: &mut Self::Cache, _page: u32, _bytes: &[u8]) {}

    /// A step begins: compute what its positions need for each rope.
    fn begin(&mut self, batch: &Batch, ropes: &[Rope]) -> Result<()>;
    fn upload(&mut self, values: &[f32], width: usize, out: &mut Self::Buffer) -> Result<()>;
    /// `out = x / rms(x) * weight + bias`, of `x - mean(x)` where it is centred; `next` is the matrix that will read it, if
    /// one will.
    fn norm(
        &mut self,
        x: &Self::Buffer,
        norm: &Norm<Self::Vector>,
        next: Option<&Self::Matrix>,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out = x matrix^T + bias`
    fn linear(
        &mut self,
        matrix: &Self::Matrix,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out += x matrix^T + bias`
    fn linear_add(
        &mut self,
        matrix: &Self::Matrix,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out = activation(x gate^T) * (x up^T)` of a matrix with the parts gate and up, of the same size.
    fn gated(
        &mut self,
        activation: Activation,
        matrix: &Self::Matrix,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out = activation(x matrix^T + bias)`
    fn activated(
        &mut self,
        activation: Activation,
        matrix: &Self::Matrix,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// What [`Self::gated`] (or, without gates, [`Self::activated`]) makes of the matrix's product `x`, which was added to.
    fn activate(
        &mut self,
        activation: Activation,
        gated: bool,
        x: &Self::Buffer,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Norm and rotate the heads of `qkv`, keep keys and values in the cache of `layer`, attend. `out` has all rows, or
    /// those of `batch.outputs` where that is all that is wanted of the last layer.
    #[expect(
        clippy::too_many_arguments,
        reason = "a layer's parts, each of another owner"
    )]
    fn attention(
        &mut self,
        layer: usize,
        spec: &AttentionLayer<Self::Vector>,
        batch: &Batch,
        qkv: &mut Self::Buffer,
        cache: &mut Self::Cache,
        outputs_only: bool,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Of rows `[a | b | x]` of three times the width: `a x` is kept in the cache of `layer`, convolved over positions
    /// and multiplied by `b`. Which rows `out` has: as in [`Self::attention`].
    #[expect(
        clippy::too_many_arguments,
        reason = "a layer's parts, each of another owner"
    )]
    fn convolve(
        &mut self,
        layer: usize,
        spec: &Convolution<Self::Vector>,
        batch: &Batch,
        x: &Self::Buffer,
        cache: &mut Self::Cache,
        outputs_only: bool,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// Numbers beyond `limit` become it, on both sides of zero.
    fn clamp(&mut self, x: &mut Self::Buffer, limit: f32) -> Result<()>;
    /// `out` = the columns `from..from + width` of `x`
    fn columns(
        &mut self,
        x: &Self::Buffer,
        from: usize,
        width: usize,
        out: &mut Self::Buffer,
    ) -> Result<()>;
    /// `out` = the parts side by side, which have equally many rows.
    fn join(&mut self, parts: &[&Self::Buffer], out: &mut Self::Buffer) -> Result<()>;
    /// `x += y * scale`
    fn add(&mut self, x: &mut Self::Buffer, y: &Self::Buffer, scale: f32) -> Result<()>;
    /// `x[row] += y[i] * share` for the i-th `(row, share)` of `to`; rows ascend.
    fn add_rows(&mut self, x: &mut Self::Buffer, y: &Self::Buffer, to: &[(u32, f32)])
    -> Result<()>;
    /// What is in `x`.
    fn read(&self, x: &Self::Buffer, out: &mut Vec<f32>) -> Result<()>;
    /// `out` = the chosen rows of `x`
    fn rows(&mut self, x: &Self::Buffer, rows: &[u32], out: &mut Self::Buffer) -> Result<()>;
    /// `out = x head^T + bias`, and of that `softcap * tanh(_ / softcap)` where there is one. `wanted` names the tiles of
    /// [`TILE`] tokens, ascending, that are read; what is in the others may be minus infinity instead. None: all are.
    fn logits(
        &mut self,
        head: &Self::Matrix,
        x: &Self::Buffer,
        wanted: Option<&[u32]>,
        softcap: Option<f32>,
        out: &mut Vec<f32>,
    ) -> Result<()>;
}

/// Cosines and sines of every row's position for one rope, `[rows][angles]`.
#[derive(Default, Clone)]
pub struct Angles {
    pub cos: Vec<f32>,
    pub sin: Vec<f32>,
    pub per_row: usize,
    /// Multiplies the queries of a row, where the rope says so.
    pub queries: Option<Vec<f32>>,
}

impl Angles {
    /// Compute them for a step, reusing memory. f32 throughout, as transformers does.
    pub fn fill(&mut self, batch: &Batch, rope: &Rope) {
        self.cos.clear();
        self.sin.clear();
        self.per_row = rope.frequencies.len();
        self.queries = rope.growth.map(|growth| {
            let at = |p: &u32| 1.0 + growth.beta * (1.0 + (*p as f32 / growth.each).floor()).ln();
            batch.positions.iter().map(at).collect()
        });
        for span in &batch.spans {
            let long = rope.long_frequencies.as_ref().filter(|_| span.long);
            let frequencies = long.unwrap_or(&rope.frequencies);
            for position in span.start..span.start + span.rows {
                for frequency in frequencies {
                    let (sin, cos) = (position as f32 * frequency).sin_cos();
                    self.cos.push(cos * rope.factor);
                    self.sin.push(sin * rope.factor);
                }
            }
        }
    }
}
