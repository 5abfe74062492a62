//! Path -> tokenizer + encoder: texts to vectors. How tokens' vectors become a text's is here; what a model wants of it is
//! said by the caller, who reads sentence-transformers' files.

use std::path::Path;
use std::process;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use super::DeviceKind;
use crate::batch::PAGE;
use crate::candle::Candle;
use crate::cpu::Cpu;
use crate::decoder::Progress;
use crate::device::{Device, KvType};
use crate::encoder::{Encoder, EncoderArch, Resident};
use crate::error::{Error, Result};
use crate::files;
use crate::tokenizer::Tokenizer;

/// Pages of a step: so many tokens, in whole pages, that the matrices are read for enough of them.
const STEP: usize = 4096 / PAGE;

/// How the vectors of a text's tokens become one.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Pooling {
    /// The first token's.
    Cls,
    Mean,
    Max,
    /// The sum by the square root of the count.
    MeanSqrt,
    /// The mean where the n-th token counts n times.
    WeightedMean,
    Last,
}

impl Pooling {
    const NAMES: [(&'static str, Self); 6] = [
        ("cls", Self::Cls),
        ("mean", Self::Mean),
        ("max", Self::Max),
        ("mean_sqrt_len_tokens", Self::MeanSqrt),
        ("weightedmean", Self::WeightedMean),
        ("lasttoken", Self::Last),
    ];

    /// `vectors` are `[tokens, width]`, at least one.
    fn of(self, vectors: &[f32], width: usize, out: &mut [f32]) {
        let rows = vectors.chunks_exact(width);
        let count = rows.len();
        match self {
            Self::Cls => out.copy_from_slice(&vectors[..width]),
            Self::Last => out.copy_from_slice(&vectors[(count - 1) * width..]),
            Self::Max => {
                out.fill(f32::NEG_INFINITY);
                rows.for_each(|row| out.iter_mut().zip(row).for_each(|(o, x)| *o = o.max(*x)));
            }
            Self::Mean | Self::MeanSqrt | Self::WeightedMean => {
                let mut sums = vec![0f64; width];
                let mut weights = 0.0;
                for (i, row) in rows.enumerate() {
                    let weight = match self {
                        Self::WeightedMean => (i + 1) as f64,
                        _ => 1.0,
                    };
                    weights += weight;
                    let add = |(sum, x): (&mut f64, &f32)| *sum += weight * f64::from(*x);
                    sums.iter_mut().zip(row).for_each(add);
                }
                let by = match self {
                    Self::MeanSqrt => weights.sqrt(),
                    _ => weights,
                };
                out.iter_mut()
                    .zip(sums)
                    .for_each(|(o, sum)| *o = (sum / by) as f32);
            }
        }
    }
}

impl FromStr for Pooling {
    type Err = Error;

    /// By the names that sentence-transformers writes.
    fn from_str(name: &str) -> Result<Self> {
        let found = Self::NAMES.iter().find(|(known, _)| *known == name);
        found
            .map(|(_, pooling)| *pooling)
            .ok_or_else(|| Error::Unsupported {
                what: "pooling",
                name: name.into(),
                supported: Self::NAMES.map(|(known, _)| known).join(", "),
            })
    }
}

/// A tokenizer and an encoder in memory. Calls from several threads take turns.
pub struct Embedder {
    pub tokenizer: Arc<Tokenizer>,
    pub family: &'static str,
    /// Numbers of a vector.
    pub width: usize,
    /// Most tokens of a text, special ones among them: what is beyond is cut off.
    pub max_tokens: usize,
    run: Mutex<Box<dyn Run>>,
}

/// An encoder on some device.
trait Run: Send {
    fn forward(&mut self, sequences: &[&[u32]], out: &mut Vec<f32>) -> Result<()>;
}

/// Threads do not survive a fork: the encoder of a child is made again, of the same weights.
struct Runner<D: Device> {
    resident: Arc<Resident<D>>,
    device: Box<dyn Fn() -> D + Send>,
    pages: usize,
    encoder: Option<(u32, Encoder<D>)>,
}

impl<D: Device> Run for Runner<D> {
    fn forward(&mut self, sequences: &[&[u32]], out: &mut Vec<f32>) -> Result<()> {
        let here = process::id();
        let encoder = match self.encoder.take() {
            Some((made_in, encoder)) if made_in == here => encoder,
            left => {
                // What a parent left is not dropped: its threads are not here to be joined.
                std::mem::forget(left);
                Encoder::new((self.device)(), self.resident.clone(), self.pages)?
            }
        };
        let (_, encoder) = self.encoder.insert((here, encoder));
        encoder.forward(sequences, out)
    }
}

impl Embedder {
    /// Open the checkpoint at `path` on so many threads. `max_tokens`: none, or more than the model takes: all it takes.
    ///
    /// # Errors
    /// `InvalidRequest` where `max_tokens` leaves no room for text. Those of [`files::open`], [`Tokenizer::from_dir`] and [`EncoderArch::read`]; `Closed` when `progress` says to stop.
    pub fn open(
        path: &Path,
        device: DeviceKind,
        threads: Option<usize>,
        max_tokens: Option<usize>,
        progress: Progress,
    ) -> Result<Self> {
        let weights = Arc::new(files::open(path)?);
        let arch = EncoderArch::read(&weights)?;
        let (family, width) = (arch.family, arch.hidden_size);
        let max_tokens = max_tokens.map_or(arch.context_size, |n| n.min(arch.context_size));
        let tokenizer = Tokenizer::from_dir(path)?.with_max_tokens(Some(max_tokens))?;
        let pages = STEP.max(max_tokens.div_ceil(PAGE));
        let run: Box<dyn Run> = match device {
            DeviceKind::Cpu => {
                let device = move || Cpu::new(threads).with_kv_type(KvType::F16);
                Box::new(Runner {
                    resident: Arc::new(Resident::load(&device(), arch, weights, progress)?),
                    device: Box::new(device),
                    pages,
                    encoder: None,
                })
            }
            DeviceKind::Reference => Box::new(Runner {
                resident: Arc::new(Resident::load(&Candle::cpu(), arch, weights, progress)?),
                device: Box::new(Candle::cpu),
                pages,
                encoder: None,
            }),
        };
        Ok(Self {
            tokenizer: Arc::new(tokenizer),
            family,
            width,
            max_tokens,
            run: Mutex::new(run),
        })
    }

    /// A vector for each text, `[texts, width]`, of unit length where `normalize` says so. Texts of like length run together;
    /// `progress(done, total)` is told in texts.
    ///
    /// # Errors
    /// `Closed` when `progress` says to stop.
    pub fn embed(
        &self,
        texts: &[String],
        pooling: Pooling,
        normalize: bool,
        progress: Progress,
    ) -> Result<Vec<f32>> {
        let ids = self.tokenizer.encode_batch(texts, true)?;
        let mut order: Vec<usize> = (0..texts.len()).collect();
        order.sort_by_key(|i| std::cmp::Reverse(ids[*i].len()));
        let mut out = vec![0.0; texts.len() * self.width];
        let mut vectors = Vec::new();
        let mut run = self.run.lock().unwrap_or_else(PoisonError::into_inner);
        let mut rest = &order[..];
        while !rest.is_empty() {
            if !progress((order.len() - rest.len()) as u64, order.len() as u64) {
                return Err(Error::Closed);
            }
            let count = step(rest.iter().map(|i| ids[*i].len()));
            let (now, later) = rest.split_at(count);
            let sequences: Vec<&[u32]> = now.iter().map(|i| &ids[*i][..]).collect();
            run.forward(&sequences, &mut vectors)?;
            let mut left = &vectors[..];
            for i in now {
                let (own, others) = left.split_at(ids[*i].len() * self.width);
                left = others;
                let out = &mut out[i * self.width..(i + 1) * self.width];
                if !own.is_empty() {
                    pooling.of(own, self.width, out);
                }
                if normalize {
                    to_unit_length(out);
                }
            }
            rest = later;
        }
        progress(order.len() as u64, order.len() as u64);
        Ok(out)
    }
}

/// How many sequences of these lengths a step takes: at least one.
fn step(lengths: impl Iterator<Item = usize>) -> usize {
    let mut pages = 0;
    let fits = |length: &usize| {
        pages += length.div_ceil(PAGE);
        pages <= STEP
    };
    lengths.take_while(fits).count().max(1)
}

fn to_unit_length(vector: &mut [f32]) {
    let squares: f64 = vector.iter().map(|x| f64::from(*x) * f64::from(*x)).sum();
    // As torch: never by less than 1e-12.
    let by = squares.sqrt().max(1e-12) as f32;
    vector.iter_mut().for_each(|x| *x /= by);
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn poolings_are_what_sentence_transformers_does() {
        let vectors = [1.0, -2.0, 3.0, 4.0, 5.0, 0.0];
        let pooled = |name: &str| {
            let mut out = [0.0; 2];
            name.parse::<Pooling>().unwrap().of(&vectors, 2, &mut out);
            out
        };
        assert_eq!(pooled("cls"), [1.0, -2.0]);
        assert_eq!(pooled("lasttoken"), [5.0, 0.0]);
        assert_eq!(pooled("mean"), [3.0, 2.0 / 3.0]);
        assert_eq!(pooled("max"), [5.0, 4.0]);
        assert_eq!(pooled("weightedmean"), [22.0 / 6.0, 1.0]);
        let root = 3f64.sqrt();
        let sums = [9.0, 2.0].map(|sum| (sum / root) as f32);
        assert_eq!(pooled("mean_sqrt_len_tokens"), sums);
        assert!("middle".parse::<Pooling>().is_err());
    }

    #[test]
    fn a_step_takes_whole_sequences_and_at_least_one() {
        assert_eq!(step([STEP * PAGE * 2, 3].into_iter()), 1);
        assert_eq!(step([STEP * PAGE - PAGE, 1, 1].into_iter()), 2);
        assert_eq!(step([1; 3].into_iter()), 3);
    }
}
