//! Attention over latents: what all heads share of a position is cached, and their own matrices move to the queries.

use super::Device;
use crate::arch::LatentArch;
use crate::batch::Batch;
use crate::device::{AttentionLayer, Norm};
use crate::error::Result;

/// A layer of it. A head's score is `q^T K c + r^T k` of a position's latent `c` and rotated key `k`, so `K^T q` is looked
/// for among latents; its output is `V` times the latents' weighted sum. For the cache that is one head, whose keys are
/// `[k | c]` and whose values are the same: of 16 heads of 192 and 128 numbers it keeps a fifth.
pub(super) struct Latent<D: Device> {
    pub arch: LatentArch,
    /// What queries are made of, where that is not the stream.
    pub query_latent: Option<(D::Matrix, Norm<D::Vector>)>,
    /// Queries of all heads, `[plain | rotated]` each.
    pub queries: D::Matrix,
    /// The latent and the key that is rotated.
    pub latent: D::Matrix,
    pub latent_norm: Norm<D::Vector>,
    /// For each head from a query to latents, and from latents to a value.
    pub keys: Vec<D::Matrix>,
    pub values: Vec<D::Matrix>,
    pub attention: AttentionLayer<D::Vector>,
}

/// What is computed on the way, kept for the next step.
pub(super) struct Room<D: Device> {
    low: D::Buffer,
    normed: D::Buffer,
    queries: D::Buffer,
    latent: D::Buffer,
    part: D::Buffer,
    attended: D::Buffer,
    /// What is put side by side.
    parts: Vec<D::Buffer>,
}

impl<D: Device> Default for Room<D> {
    fn default() -> Self {
        Self {
            low: D::Buffer::default(),
            normed: D::Buffer::default(),
            queries: D::Buffer::default(),
            latent: D::Buffer::default(),
            part: D::Buffer::default(),
            attended: D::Buffer::default(),
            parts: Vec::new(),
        }
    }
}

impl<D: Device> Latent<D> {
    /// The matrix that reads the stream first.
    pub fn first(&self) -> &D::Matrix {
        match &self.query_latent {
            Some((matrix, _)) => matrix,
            None => &self.queries,
        }
    }

    /// What the heads make of the rows of `x` and of the cache of layer `i`, their values side by side; of the outputs
    /// alone where nobody wants the others.
    #[expect(
        clippy::too_many_arguments,
        reason = "a layer's parts, each of another owner"
    )]
    pub fn run(
        &self,
        device: &mut D,
        (i, batch, outputs_only): (usize, &Batch, bool),
        x: &D::Buffer,
        cache: &mut D::Cache,
        room: &mut Room<D>,
        qkv: &mut D::Buffer,
        out: &mut D::Buffer,
    ) -> Result<()> {
        let (arch, heads) = (&self.arch, self.keys.len());
        room.parts.resize_with(2 * heads + 2, D::Buffer::default);
        self.make_queries(device, x, room)?;
        device.linear(&self.latent, x, &mut room.latent)?;
        device.columns(&room.latent, 0, arch.rank, &mut room.part)?;
        let own = &mut room.parts[2 * heads..];
        device.norm(&room.part, &self.latent_norm, None, &mut own[1])?;
        device.columns(&room.latent, arch.rank, arch.rotated, &mut own[0])?;
        let parts: Vec<&D::Buffer> = room.parts.iter().chain(&room.parts[2 * heads..]).collect();
        device.join(&parts, qkv)?;
        let attended = &mut room.attended;
        device.attention(
            i,
            &self.attention,
            batch,
            qkv,
            cache,
            outputs_only,
            attended,
        )?;
        if outputs_only && batch.outputs.is_empty() {
            return Ok(());
        }
        let width = arch.rotated + arch.rank;
        for (head, matrix) in self.values.iter().enumerate() {
            let from = head * width + arch.rotated;
            device.columns(&room.attended, from, arch.rank, &mut room.part)?;
            device.linear(matrix, &room.part, &mut room.parts[head])?;
        }
        let parts: Vec<&D::Buffer> = room.parts[..heads].iter().collect();
        device.join(&parts, out)
    }

    /// The first parts: for each head what is rotated of its query, and what looks for latents.
    fn make_queries(&self, device: &mut D, x: &D::Buffer, room: &mut Room<D>) -> Result<()> {
        let arch = &self.arch;
        match &self.query_latent {
            Some((matrix, norm)) => {
                device.linear(matrix, x, &mut room.low)?;
                device.norm(&room.low, norm, Some(&self.queries), &mut room.normed)?;
                device.linear(&self.queries, &room.normed, &mut room.queries)?;
            }
            None => device.linear(&self.queries, x, &mut room.queries)?,
        }
        for (head, matrix) in self.keys.iter().enumerate() {
            let from = head * (arch.plain + arch.rotated);
            let [rotated, latent] = &mut room.parts[2 * head..2 * head + 2] else {
                continue;
            };
            device.columns(&room.queries, from + arch.plain, arch.rotated, rotated)?;
            device.columns(&room.queries, from, arch.plain, &mut room.part)?;
            device.linear(matrix, &room.part, latent)?;
        }
        Ok(())
    }
}
