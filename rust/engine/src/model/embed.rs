//! Path -> tokenizer + encoder: texts to vectors. How tokens' vectors become a text's is here; what a model wants of it is
//! said by the caller, who reads sentence-transformers' files.

use std::path::{Path, PathBuf};
use std::process;
use std::str::FromStr;
use std::sync::{Arc, Mutex, PoisonError};

use serde_json::Value as Json;

use super::DeviceKind;
use crate::arch::Arch;
use crate::batch::{Batch, PAGE};
use crate::candle::Candle;
use crate::cpu::Cpu;
use crate::decoder::{self, Decoder, Progress};
use crate::device::{Device, KvType};
use crate::encoder::{self, Encoder, EncoderArch};
use crate::error::{Error, Result};
use crate::files;
use crate::tokenizer::Tokenizer;
use crate::weights::Weights;

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

    /// `vectors` are `[tokens, width]`, at least one. What goes over all of them leaves the first `skip` out.
    fn of(self, vectors: &[f32], width: usize, skip: usize, out: &mut [f32]) {
        let rows = vectors.chunks_exact(width);
        let count = rows.len();
        let rows = rows.enumerate().skip(skip);
        match self {
            Self::Cls => out.copy_from_slice(&vectors[..width]),
            Self::Last => out.copy_from_slice(&vectors[(count - 1) * width..]),
            _ if rows.len() == 0 => out.fill(0.0),
            Self::Max => {
                out.fill(f32::NEG_INFINITY);
                rows.for_each(|(_, row)| {
                    let both = out.iter_mut().zip(row);
                    both.for_each(|(o, x)| *o = o.max(*x));
                });
            }
            Self::Mean | Self::MeanSqrt | Self::WeightedMean => {
                let mut sums = vec![0f64; width];
                let mut weights = 0.0;
                for (i, row) in rows {
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

/// A module of sentence-transformers after the pooling: `activation(weight x + bias)`.
struct Dense {
    /// `[outputs, inputs]`
    weight: Vec<f32>,
    bias: Vec<f32>,
    inputs: usize,
    tanh: bool,
}

impl Dense {
    /// Read it from its directory: config.json, and `linear.weight` and `linear.bias` in safetensors.
    fn open(dir: &Path, inputs: usize) -> Result<Self> {
        let weights = files::open(dir)?;
        let config = weights.config.as_ref();
        let kind = config.and_then(|c| c.get("activation_function"));
        let kind = kind.and_then(Json::as_str).unwrap_or("Tanh");
        let tanh = match kind.rsplit('.').next().unwrap_or(kind) {
            "Tanh" => true,
            "Identity" => false,
            _ => {
                return Err(Error::Unsupported {
                    what: "activation",
                    name: kind.into(),
                    supported: "Tanh, Identity".into(),
                });
            }
        };
        let weight = weights.require("linear.weight")?;
        let bias = weights.tensor("linear.bias");
        let outputs = weight.rows();
        let fits = weight.shape == [outputs, inputs] && outputs > 0;
        if !fits || bias.is_some_and(|b| b.shape != [outputs]) {
            let got = (weight.shape, bias.map(|b| b.shape));
            return Err(weights.problem(format!(
                "linear.weight and linear.bias are {got:?}, wanted {inputs} inputs"
            )));
        }
        Ok(Self {
            weight: weight.dequantize(),
            bias: bias.map_or(vec![0.0; outputs], |bias| bias.dequantize()),
            inputs,
            tanh,
        })
    }

    fn of(&self, x: &[f32]) -> Vec<f32> {
        let rows = self.weight.chunks_exact(self.inputs).zip(&self.bias);
        let outputs = rows.map(|(row, bias)| dot(row, x) + bias);
        match self.tanh {
            true => outputs.map(f32::tanh).collect(),
            false => outputs.collect(),
        }
    }
}

/// In sixteen sums, so that the compiler may use vectors.
fn dot(a: &[f32], b: &[f32]) -> f32 {
    let mut sums = [0f32; 16];
    let (a, b) = (a.chunks(16), b.chunks(16));
    for (a, b) in a.zip(b) {
        let products = a.iter().zip(b).map(|(a, b)| a * b);
        sums.iter_mut().zip(products).for_each(|(s, p)| *s += p);
    }
    sums.iter().sum()
}

/// What becomes of the vectors of a text's tokens.
#[derive(Debug, Clone)]
pub struct Head {
    /// Their results lie side by side.
    pub pooling: Vec<Pooling>,
    /// Directories of dense layers, one after the other.
    pub dense: Vec<PathBuf>,
}

impl FromStr for Head {
    type Err = Error;

    /// Poolings by their names with `+` between them; no dense layer.
    fn from_str(names: &str) -> Result<Self> {
        Ok(Self {
            pooling: names.split('+').map(str::parse).collect::<Result<_>>()?,
            dense: Vec::new(),
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
    /// Numbers of a token's vector.
    hidden_size: usize,
    pooling: Vec<Pooling>,
    dense: Vec<Dense>,
    /// Tokens see those before them, and the last token's vector is all that is wanted.
    last_only: bool,
    run: Mutex<Runner>,
}

/// A model on some device: the vectors of a step's `outputs`.
trait Run: Send {
    fn run(&mut self, batch: &Batch, out: &mut Vec<f32>) -> Result<()>;
}

impl<D: Device> Run for Encoder<D> {
    fn run(&mut self, batch: &Batch, out: &mut Vec<f32>) -> Result<()> {
        self.forward(batch, out)
    }
}

impl<D: Device> Run for Decoder<D> {
    fn run(&mut self, batch: &Batch, out: &mut Vec<f32>) -> Result<()> {
        self.vectors(batch, out)
    }
}

/// Makes what runs, of weights in memory, with room for so many pages.
type Make = Box<dyn Fn(usize) -> Result<Box<dyn Run>> + Send>;

/// Threads do not survive a fork: what runs in a child is made again, of the same weights.
struct Runner {
    make: Make,
    pages: usize,
    made: Option<(u32, Box<dyn Run>)>,
    batch: Batch,
}

impl Runner {
    /// The vectors of all tokens of these sequences, or of each one's last.
    fn vectors(&mut self, sequences: &[&[u32]], last_only: bool, out: &mut Vec<f32>) -> Result<()> {
        self.batch.clear();
        let mut pages: Vec<u32> = Vec::new();
        for ids in sequences.iter().filter(|ids| !ids.is_empty()) {
            let next = pages.len() as u32;
            pages.extend(next..next + ids.len().div_ceil(PAGE) as u32);
            self.batch.push(ids, 0, &pages[next as usize..], false);
            let rows = self.batch.tokens.len() as u32;
            let first = if last_only { 1 } else { ids.len() as u32 };
            self.batch.outputs.extend(rows - first..rows);
        }
        if pages.is_empty() {
            out.clear();
            return Ok(());
        }
        let here = process::id();
        let made = match self.made.take() {
            Some((made_in, made)) if made_in == here && pages.len() <= self.pages => made,
            left => {
                if left.as_ref().is_some_and(|(made_in, _)| *made_in != here) {
                    // Not dropped: its threads are not here to be joined.
                    std::mem::forget(left);
                }
                self.pages = self.pages.max(pages.len());
                (self.make)(self.pages)?
            }
        };
        let (_, made) = self.made.insert((here, made));
        made.run(&self.batch, out)
    }
}

/// What a checkpoint holds.
enum Kind {
    Encoder(Box<EncoderArch>),
    Decoder(Box<Arch>),
}

impl Kind {
    fn read(weights: &Weights) -> Result<Self> {
        let encodes = weights.config.as_ref().is_some_and(EncoderArch::knows);
        if encodes {
            return Ok(Self::Encoder(Box::new(EncoderArch::read(weights)?)));
        }
        let arch = Arch::read_any(weights).map_err(|error| match error {
            Error::Unsupported {
                what: "architecture",
                name,
                supported,
            } => Error::Unsupported {
                what: "architecture",
                name,
                supported: EncoderArch::families().collect::<Vec<_>>().join(", ")
                    + ", "
                    + &supported,
            },
            other => other,
        })?;
        Ok(Self::Decoder(Box::new(arch)))
    }

    /// Name, numbers of a vector, and most tokens.
    fn sizes(&self) -> (&'static str, usize, usize) {
        match self {
            Self::Encoder(arch) => (arch.family, arch.hidden_size, arch.context_size),
            Self::Decoder(arch) => (arch.family, arch.hidden_size, arch.context_size),
        }
    }

    /// Make the weights resident.
    fn load<D: Device + 'static>(
        self,
        device: impl Fn() -> D + Send + 'static,
        weights: Arc<Weights>,
        progress: Progress,
    ) -> Result<Make> {
        Ok(match self {
            Self::Encoder(arch) => {
                let resident = encoder::Resident::load(&device(), *arch, weights, progress)?;
                let resident = Arc::new(resident);
                Box::new(move |pages| -> Result<Box<dyn Run>> {
                    Ok(Box::new(Encoder::new(device(), resident.clone(), pages)?))
                })
            }
            Self::Decoder(arch) => {
                let resident =
                    decoder::Resident::load_headless(&device(), *arch, weights, progress)?;
                let resident = Arc::new(resident);
                Box::new(move |pages| -> Result<Box<dyn Run>> {
                    Ok(Box::new(Decoder::new(device(), resident.clone(), pages)?))
                })
            }
        })
    }
}

impl Embedder {
    /// Open the checkpoint at `path`, an encoder's or a decoder's, on so many threads. `max_tokens`: none, or more than the
    /// model takes: all it takes.
    ///
    /// # Errors
    /// `InvalidRequest` where `max_tokens` leaves no room for text. Those of [`files::open`], [`Tokenizer::from_dir`],
    /// [`EncoderArch::read`] and [`Arch::read`]; `Closed` when `progress` says to stop.
    pub fn open(
        path: &Path,
        device: DeviceKind,
        threads: Option<usize>,
        max_tokens: Option<usize>,
        head: Head,
        progress: Progress,
    ) -> Result<Self> {
        let weights = Arc::new(files::open(path)?);
        let kind = Kind::read(&weights)?;
        let (family, hidden_size, context_size) = kind.sizes();
        let max_tokens = max_tokens.map_or(context_size, |n| n.min(context_size));
        let tokenizer = Tokenizer::from_dir(path)?.with_max_tokens(Some(max_tokens))?;
        let mut width = hidden_size * head.pooling.len();
        let mut dense: Vec<Dense> = Vec::with_capacity(head.dense.len());
        for dir in &head.dense {
            let next = Dense::open(dir, width)?;
            width = next.bias.len();
            dense.push(next);
        }
        let causal = matches!(&kind, Kind::Decoder(arch) if !arch.both_ways);
        let make = match device {
            DeviceKind::Cpu => {
                let device = move || Cpu::new(threads).with_kv_type(KvType::F16);
                kind.load(device, weights, progress)?
            }
            DeviceKind::Reference => kind.load(Candle::cpu, weights, progress)?,
        };
        Ok(Self {
            tokenizer: Arc::new(tokenizer),
            family,
            width,
            max_tokens,
            hidden_size,
            last_only: causal && head.pooling.iter().all(|p| *p == Pooling::Last),
            pooling: head.pooling,
            dense,
            run: Mutex::new(Runner {
                make,
                pages: STEP,
                made: None,
                batch: Batch::default(),
            }),
        })
    }

    /// How many tokens a text begins with that begins with `prompt`.
    ///
    /// # Errors
    /// Those of [`Tokenizer::encode`].
    pub fn prompt_tokens(&self, prompt: &str) -> Result<usize> {
        let ids = self.tokenizer.encode(prompt, true)?;
        let ends = ids.last().is_some_and(|id| self.tokenizer.is_special(*id));
        Ok(ids.len() - usize::from(ends))
    }

    /// A vector for each text, `[texts, width]`, of unit length where `normalize` says so; poolings that go over all tokens
    /// leave the first `skip` out. Texts of like length run together; `progress(done, total)` is told in texts.
    ///
    /// # Errors
    /// `Closed` when `progress` says to stop.
    pub fn embed(
        &self,
        texts: &[String],
        skip: usize,
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
            run.vectors(&sequences, self.last_only, &mut vectors)?;
            let mut left = &vectors[..];
            for i in now {
                let tokens = match self.last_only {
                    true => ids[*i].len().min(1),
                    false => ids[*i].len(),
                };
                let (own, others) = left.split_at(tokens * self.hidden_size);
                left = others;
                let out = &mut out[i * self.width..(i + 1) * self.width];
                self.pool(own, skip, out);
                if normalize {
                    to_unit_length(out);
                }
            }
            rest = later;
        }
        progress(order.len() as u64, order.len() as u64);
        Ok(out)
    }

    /// One text's vector of its tokens'; of no tokens, zeros.
    fn pool(&self, vectors: &[f32], skip: usize, out: &mut [f32]) {
        if vectors.is_empty() {
            return;
        }
        let mut pooled = vec![0.0; self.hidden_size * self.pooling.len()];
        let parts = pooled.chunks_exact_mut(self.hidden_size);
        for (pooling, part) in self.pooling.iter().zip(parts) {
            pooling.of(vectors, self.hidden_size, skip, part);
        }
        for dense in &self.dense {
            pooled = dense.of(&pooled);
        }
        out.copy_from_slice(&pooled);
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
            let pooling: Pooling = name.parse().unwrap();
            pooling.of(&vectors, 2, 0, &mut out);
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
        let head: Head = "cls+max".parse().unwrap();
        assert_eq!(head.pooling, [Pooling::Cls, Pooling::Max]);
        assert!("cls+".parse::<Head>().is_err());
    }

    #[test]
    fn a_prompt_that_does_not_count_is_left_out_of_what_goes_over_all_tokens() {
        let vectors = [1.0, -2.0, 3.0, 4.0, 5.0, 0.0];
        let pooled = |name: &str, skip| {
            let mut out = [9.0; 2];
            let pooling: Pooling = name.parse().unwrap();
            pooling.of(&vectors, 2, skip, &mut out);
            out
        };
        assert_eq!(pooled("cls", 1), [1.0, -2.0]);
        assert_eq!(pooled("lasttoken", 3), [5.0, 0.0]);
        assert_eq!(pooled("mean", 1), [4.0, 2.0]);
        assert_eq!(pooled("max", 2), [5.0, 0.0]);
        assert_eq!(pooled("weightedmean", 1), [21.0 / 5.0, 8.0 / 5.0]);
        assert_eq!(pooled("mean", 3), [0.0, 0.0]);
    }

    #[test]
    fn a_dense_layer_is_a_product_a_bias_and_an_activation() {
        let layer = |tanh| Dense {
            weight: (0..40).map(|i| i as f32 / 40.0).collect(),
            bias: vec![0.5, -0.5],
            inputs: 20,
            tanh,
        };
        let x: Vec<f32> = (0..20).map(|i| (i % 3) as f32 - 1.0).collect();
        let sum = |row: usize| {
            (0..20)
                .map(|i| (row * 20 + i) as f32 / 40.0 * x[i])
                .sum::<f32>()
        };
        let want = [sum(0) + 0.5, sum(1) - 0.5];
        for (tanh, got) in [(false, layer(false).of(&x)), (true, layer(true).of(&x))] {
            for (got, want) in got.iter().zip(want) {
                let want = if tanh { want.tanh() } else { want };
                assert!((got - want).abs() < 1e-5, "{got} for {want}");
            }
        }
    }

    #[test]
    fn a_step_takes_whole_sequences_and_at_least_one() {
        assert_eq!(step([STEP * PAGE * 2, 3].into_iter()), 1);
        assert_eq!(step([STEP * PAGE - PAGE, 1, 1].into_iter()), 2);
        assert_eq!(step([1; 3].into_iter()), 3);
    }
}
