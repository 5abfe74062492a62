//! Encoders of BERT's kind, generic over their device: whole sequences in, a vector for each token out. Nothing is kept
//! from step to step. What becomes of the vectors is `model/embed.rs`.
//!
//! A layer adds what its attention makes and what its feed-forward makes of that; it norms either sum (Devlin et al. 2018,
//! arXiv:1810.04805), or what both read (modernbert: Warner et al. 2024, arXiv:2412.13663).

mod arch;
mod load;

use std::sync::Arc;

pub use self::arch::EncoderArch;
use crate::batch::Batch;
use crate::device::{AttentionLayer, Device, Norm};
use crate::error::{Error, Result};
use crate::weights::Weights;

struct Layer<D: Device> {
    input_norm: Option<Norm<D::Vector>>,
    qkv: D::Matrix,
    attn_output: D::Matrix,
    middle_norm: Norm<D::Vector>,
    up: D::Matrix,
    gated: bool,
    down: D::Matrix,
    output_norm: Option<Norm<D::Vector>>,
}

/// An encoder's weights on a device.
pub struct Resident<D: Device> {
    pub arch: EncoderArch,
    weights: Arc<Weights>,
    /// Names of tables that are read row by row from the file.
    words: String,
    positions: Option<String>,
    /// What every token has added: it is of the first kind.
    kind: Vec<f32>,
    embedding_norm: Norm<D::Vector>,
    /// What makes embeddings as wide as the layers, where they are not.
    widen: Option<D::Matrix>,
    /// One where all layers share it.
    layers: Vec<Layer<D>>,
    /// Attention of layers that see all, and of those with a window.
    attention: [AttentionLayer<D::Vector>; 2],
    final_norm: Option<Norm<D::Vector>>,
}

impl<D: Device> Resident<D> {
    /// The sum of word, position and kind, from the file.
    fn embed(&self, batch: &Batch, out: &mut Vec<f32>) -> Result<()> {
        let width = self.arch.embedding_size;
        let words = self.weights.require(&self.words)?;
        let positions = match &self.positions {
            Some(name) => Some(self.weights.require(name)?),
            None => None,
        };
        let first = self.arch.first_position.unwrap_or(0);
        let mut position = vec![0.0; width];
        out.resize(batch.tokens.len() * width, 0.0);
        let rows = batch.tokens.iter().zip(&batch.positions);
        for ((&token, &at), row) in rows.zip(out.chunks_exact_mut(width)) {
            if token as usize >= self.arch.vocab_size {
                let size = self.arch.vocab_size;
                return Err(Error::InvalidRequest(format!(
                    "token id must be below {size}, got {token}"
                )));
            }
            words.dequantize_row(token as usize, row);
            if let Some(positions) = &positions {
                positions.dequantize_row(at as usize + first, &mut position);
            }
            let others = position.iter().zip(&self.kind);
            row.iter_mut()
                .zip(others)
                .for_each(|(x, (p, k))| *x += p + k);
        }
        Ok(())
    }
}

/// A resident encoder with a device's threads and a workspace.
pub struct Encoder<D: Device> {
    device: D,
    model: Arc<Resident<D>>,
    /// Keys and values of a step's tokens, for one layer at a time.
    cache: D::Cache,
    embedded: Vec<f32>,
    x: D::Buffer,
    y: D::Buffer,
    qkv: D::Buffer,
    attended: D::Buffer,
    wide: D::Buffer,
}

impl<D: Device> Encoder<D> {
    /// With room for steps of so many pages.
    pub fn new(device: D, model: Arc<Resident<D>>, pages: usize) -> Result<Self> {
        let cache = device.cache(pages, &[model.attention[0].shape])?;
        Ok(Self {
            device,
            model,
            cache,
            embedded: Vec::new(),
            x: D::Buffer::default(),
            y: D::Buffer::default(),
            qkv: D::Buffer::default(),
            attended: D::Buffer::default(),
            wide: D::Buffer::default(),
        })
    }

    /// The last layer's vectors of all tokens of whole sequences, `[tokens, hidden_size]`.
    ///
    /// # Errors
    /// `ContextOverflow` for a sequence that is too long, `InvalidRequest` for an unknown token.
    pub fn forward(&mut self, batch: &Batch, out: &mut Vec<f32>) -> Result<()> {
        let Self { device, model, .. } = self;
        let arch = &model.arch;
        out.clear();
        let limit = arch.context_size;
        if let Some(span) = batch.spans.iter().find(|span| span.rows > limit) {
            let prompt = span.rows;
            return Err(Error::ContextOverflow { prompt, limit });
        }
        if batch.tokens.is_empty() {
            return Ok(());
        }
        model.embed(batch, &mut self.embedded)?;
        device.begin(batch, &arch.ropes)?;
        device.upload(&self.embedded, arch.embedding_size, &mut self.y)?;
        let first = model
            .widen
            .as_ref()
            .or(model.layers.first().map(|l| &l.qkv));
        device.norm(&self.y, &model.embedding_norm, first, &mut self.x)?;
        if let Some(widen) = &model.widen {
            device.linear(widen, &self.x, &mut self.y)?;
            std::mem::swap(&mut self.x, &mut self.y);
        }
        for i in 0..arch.layers.len() {
            self.layer(batch, i)?;
        }
        let Self { device, model, .. } = self;
        if let Some(norm) = &model.final_norm {
            device.norm(&self.x, norm, None, &mut self.y)?;
            std::mem::swap(&mut self.x, &mut self.y);
        }
        device.read(&self.x, out)
    }

    /// One layer, on `x`.
    fn layer(&mut self, batch: &Batch, i: usize) -> Result<()> {
        let Self { device, model, .. } = self;
        let arch = &model.arch;
        let of = |i: usize| model.layers.get(i % model.layers.len().max(1));
        let Some(layer) = of(i) else {
            return Err(Error::Internal("an encoder without layers".into()));
        };
        let read = match &layer.input_norm {
            Some(norm) => {
                device.norm(&self.x, norm, Some(&layer.qkv), &mut self.y)?;
                &self.y
            }
            None => &self.x,
        };
        device.linear(&layer.qkv, read, &mut self.qkv)?;
        let window = arch.layers.get(i).is_some_and(|l| l.window.is_some());
        let attention = &model.attention[usize::from(window)];
        let (qkv, attended) = (&mut self.qkv, &mut self.attended);
        device.attention(0, attention, batch, qkv, &mut self.cache, false, attended)?;
        device.linear_add(&layer.attn_output, &self.attended, &mut self.x)?;
        device.norm(&self.x, &layer.middle_norm, Some(&layer.up), &mut self.y)?;
        match layer.gated {
            true => device.gated(arch.activation, &layer.up, &self.y, &mut self.wide)?,
            false => device.activated(arch.activation, &layer.up, &self.y, &mut self.wide)?,
        }
        let Some(norm) = &layer.output_norm else {
            return device.linear_add(&layer.down, &self.wide, &mut self.x);
        };
        device.linear_add(&layer.down, &self.wide, &mut self.y)?;
        let next = of(i + 1).map(|layer| &layer.qkv);
        device.norm(&self.y, norm, next, &mut self.x)
    }
}
