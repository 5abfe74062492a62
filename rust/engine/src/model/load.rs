//! How much memory a model and its draft model will take, said before anything is loaded; and their loading.

use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use super::{DeviceKind, ModelOptions};
use crate::arch::Arch;
use crate::batch::{Forward, PAGE};
use crate::candle::Candle;
use crate::cpu::Cpu;
use crate::decoder::{Decoder, Progress, Resident, attention_shapes};
use crate::device::{Device, KvType};
use crate::engine::Factory;
use crate::error::{Error, Result};
use crate::prepared::Prepared;
use crate::quantised::Quantised;
use crate::recipe::AtLoad;
use crate::tokenizer::Tokenizer;
use crate::weights::{Target, TensorInfo, Weights};
use crate::{files, vocab};

/// The weights, until they are let go of.
type Shared<T> = Arc<Mutex<Option<Arc<T>>>>;

/// Makes the adapter in a directory resident; its number.
pub type Adapt = Box<dyn Fn(&Path) -> Result<u32> + Send + Sync>;

/// What makes a decoder of weights in memory, and what lets go of them.
pub struct Loaded {
    pub factory: Factory,
    pub adapt: Adapt,
    pub release: Box<dyn Fn() + Send + Sync>,
}

/// A model file that has been read, its weights not.
pub struct Source {
    pub weights: Arc<Weights>,
    pub arch: Arch,
    /// What its matrices become as they are made resident.
    pub at_load: Option<AtLoad>,
}

/// What a model will take.
pub struct MemoryPlan {
    pub context_size: usize,
    pub pages: u32,
    pub kv_cache_bytes: u64,
}

impl Source {
    /// Bytes that stay resident, and those of a cache page.
    fn needs(&self, options: &ModelOptions) -> (u64, u64) {
        let shapes = attention_shapes(&self.arch);
        let quantised = self.weights.quantised.values();
        let (resident, page) = match options.device {
            // Tiles are at most 4 % larger than the file's blocks.
            DeviceKind::Cpu => (
                self.resident_bytes() / 100 * 104,
                Cpu::page_bytes(options.kv_cache_dtype, &shapes),
            ),
            DeviceKind::Reference => {
                let tensors = self.weights.tensors.values();
                let numbers = tensors.map(|t| t.shape.iter().product::<usize>());
                let numbers = numbers.chain(quantised.map(Quantised::elements));
                let page = 2 * Cpu::page_bytes(KvType::F16, &shapes);
                (4 * numbers.map(|n| n as u64).sum::<u64>(), page)
            }
        };
        let adapters = options.adapters.iter();
        let adapters: u64 = adapters.map(|(_, dir)| adapter_bytes(dir)).sum();
        (resident + adapters, page as u64)
    }

    /// Bytes of all tensors as they will be.
    fn resident_bytes(&self) -> u64 {
        let quantised = self.weights.quantised.values();
        let Some(at_load) = &self.at_load else {
            let (stored, made): (Vec<usize>, Vec<usize>) =
                quantised.map(|q| (q.bytes(), q.resident_bytes())).unzip();
            let sum = |bytes: &[usize]| bytes.iter().map(|n| *n as u64).sum::<u64>();
            let whole = self.weights.total_bytes() + self.weights.growth();
            return whole - sum(&stored) + sum(&made);
        };
        let bytes = |(name, info): (&String, &TensorInfo)| {
            let target = self.target(at_load, name, info);
            let cols = info.shape.last().copied().unwrap_or(1);
            let rows = info.shape.iter().product::<usize>() / cols.max(1);
            match target.and_then(|target| target.tensor_type.row_bytes(cols)) {
                Some(row) => (rows * row) as u64,
                None => info.bytes.len() as u64,
            }
        };
        self.weights.tensors.iter().map(bytes).sum()
    }

    /// What the tensor `name` becomes.
    fn target(&self, at_load: &AtLoad, name: &str, info: &TensorInfo) -> Option<Target> {
        let model = (self.arch.layers.len(), self.arch.tied);
        let target = at_load.target((name, name), info.tensor_type, &info.shape, model);
        target.filter(|_| info.shape.len() > 1)
    }

    /// The matrices as they will be, from the file `cache`, which is made if need be. Those that lie transposed in their
    /// checkpoint are not among them.
    fn prepare(
        &self,
        cache: &Path,
        threads: Option<usize>,
        progress: Progress,
    ) -> Result<Prepared> {
        let at_load = self.at_load.as_ref().filter(|_| !self.arch.transposed);
        let Some(at_load) = at_load else {
            return Err(Error::InvalidRequest(format!(
                "quantization_cache has nothing to keep: {}",
                match self.at_load {
                    Some(_) => "this family's matrices lie transposed in its files",
                    None => "nothing is quantised while it is loaded",
                }
            )));
        };
        let turned = self.arch.turned_experts();
        let tensors = self.weights.tensors.iter();
        let mut wanted: Vec<(&str, Target)> = tensors
            .filter(|(_, info)| info.shape.len() == 2 || !turned)
            .filter_map(|(name, info)| Some((&name[..], self.target(at_load, name, info)?)))
            .collect();
        wanted.sort_by_key(|(name, _)| *name);
        Prepared::open_or_make(cache, &self.weights, &wanted, threads, progress)
    }

    /// # Errors
    /// `InvalidRequest` where the model is quantised as it is, and is to be so again.
    pub fn check(&self) -> Result<()> {
        let Some(at_load) = &self.at_load else {
            return Ok(());
        };
        let tensors = self.weights.tensors.iter();
        let made = tensors.filter(|(_, info)| info.tensor_type.block_len() > 1);
        let first = made.min_by_key(|(name, _)| *name);
        let first = first.map(|(name, info)| format!("{name} is {}", info.tensor_type.name()));
        let quantised = self.weights.quantised.keys();
        let packed = self.weights.packed.keys().chain(quantised).min();
        match first.or(packed.map(|name| format!("{name} is packed"))) {
            None => Ok(()),
            Some(found) => Err(Error::InvalidRequest(format!(
                "quantization {} wants a model in F32, F16 or BF16; this one is quantised already: {found}",
                at_load.recipe.name
            ))),
        }
    }

    /// Make the weights resident.
    pub fn load(self, options: &ModelOptions, pages: usize, progress: Progress) -> Result<Loaded> {
        let (threads, kv_type) = (options.threads, options.kv_cache_dtype);
        let cache = options.quantization_cache.as_deref();
        let prepared = cache.map(|cache| self.prepare(cache, threads, progress));
        let prepared = prepared.transpose()?;
        // What is rounded off decides now and then which expert runs.
        let split = self.arch.experts.is_some();
        let cpu = move || {
            let cpu = Cpu::new(threads).with_kv_type(kv_type);
            Ok(cpu.with_split(split))
        };
        match options.device {
            DeviceKind::Cpu => self.load_on(cpu, pages, prepared, progress),
            DeviceKind::Reference => self.load_on(|| Ok(Candle::cpu()), pages, prepared, progress),
        }
    }

    fn load_on<D: Device + 'static>(
        self,
        device: impl Fn() -> Result<D> + Send + Sync + 'static,
        pages: usize,
        prepared: Option<Prepared>,
        progress: Progress,
    ) -> Result<Loaded> {
        let device = Arc::new(device);
        let at_load = self.at_load.as_ref();
        let made = prepared.as_ref();
        let resident =
            Resident::load(&device()?, self.arch, self.weights, at_load, made, progress)?;
        drop(prepared);
        let shared: Shared<Resident<D>> = Arc::new(Mutex::new(Some(Arc::new(resident))));
        let held = |shared: &Shared<Resident<D>>| {
            let held = shared.lock().unwrap_or_else(PoisonError::into_inner);
            held.clone().ok_or(Error::Closed)
        };
        let (adapted, its) = (shared.clone(), device.clone());
        let adapt = move |dir: &Path| held(&adapted)?.adapt(&its()?, dir);
        let decoded = shared.clone();
        let factory: Factory = Arc::new(move || {
            let resident = held(&decoded)?;
            Ok(Box::new(Decoder::new(device()?, resident, pages)?) as Box<dyn Forward>)
        });
        let release = move || *shared.lock().unwrap_or_else(PoisonError::into_inner) = None;
        Ok(Loaded {
            factory,
            adapt: Box::new(adapt),
            release: Box::new(release),
        })
    }
}

/// What an adapter takes, roughly: gates and inputs, and queries, keys and values, are kept as one matrix each.
fn adapter_bytes(dir: &Path) -> u64 {
    let file = std::fs::metadata(dir.join(crate::safetensors::ADAPTER));
    file.map_or(0, |file| 2 * file.len())
}

/// Decide the context and the cache before anything is loaded.
pub fn plan_memory(
    source: &Source,
    draft: Option<&Source>,
    options: &ModelOptions,
    available: Option<u64>,
) -> Result<MemoryPlan> {
    let trained = source.arch.context_size;
    let wanted = options.context_size.unwrap_or(trained);
    if wanted > trained {
        return Err(Error::InvalidRequest(format!(
            "context_size must be at most {trained}, got {wanted}"
        )));
    }
    let needs = [Some(source), draft].into_iter().flatten();
    let (resident, page_bytes) = needs
        .map(|source| source.needs(options))
        .fold((0, 0), |(a, b), (c, d)| (a + c, b + d));
    let whole = wanted.div_ceil(PAGE) as u64;
    let out_of_memory = |pages: u64| Error::OutOfMemory {
        needed: resident.saturating_add(pages.saturating_mul(page_bytes)),
        available: available.unwrap_or(0),
    };
    // Room for at least this much, or there is no point in loading.
    let least = match options.context_size {
        Some(_) => whole,
        None => whole.min(512 / PAGE as u64),
    };
    let left = available.map_or(u64::MAX, |bytes| bytes.saturating_sub(resident));
    if least * page_bytes > left || available.is_some_and(|bytes| resident > bytes) {
        return Err(out_of_memory(least));
    }
    let budget = match options.kv_cache_bytes {
        Some(bytes) if bytes > left => return Err(out_of_memory(bytes / page_bytes)),
        Some(bytes) if bytes < page_bytes => {
            return Err(Error::InvalidRequest(format!(
                "kv_cache_bytes must hold a page of {page_bytes}, got {bytes}"
            )));
        }
        Some(bytes) => bytes / page_bytes,
        None => (left / 4 / page_bytes).max(least),
    };
    let most = whole.saturating_mul(options.max_sequences as u64);
    let pages = budget.min(most).min(u64::from(u32::MAX / PAGE as u32));
    let context_size = wanted.min(pages as usize * PAGE);
    if options.context_size.is_some_and(|n| n > context_size) {
        let held = pages * PAGE as u64;
        return Err(Error::InvalidRequest(format!(
            "context_size of {wanted} needs a larger kv_cache_bytes: it holds {held}"
        )));
    }
    Ok(MemoryPlan {
        context_size,
        pages: pages as u32,
        kv_cache_bytes: pages * page_bytes,
    })
}

/// A draft model's file, and its tokenizer.
pub struct Draft {
    pub source: Source,
    tokenizer: Tokenizer,
    name: String,
}

impl Draft {
    pub fn open(path: &Path) -> Result<Self> {
        let mut weights = files::open(path)?;
        let vocabulary = weights.take_metadata("tokenizer.");
        let tokenizer = match weights.config.is_some() {
            true => Tokenizer::from_dir(path)?,
            false => vocab::tokenizer(&vocabulary)?,
        };
        let arch = Arch::read(&weights)?;
        Ok(Self {
            source: Source {
                weights: Arc::new(weights),
                arch,
                at_load: None,
            },
            tokenizer,
            name: path.display().to_string(),
        })
    }

    /// # Errors
    /// `InvalidRequest` where an id means another token here than in `tokenizer`.
    pub fn check(&self, tokenizer: &Tokenizer) -> Result<()> {
        let (mine, its) = (self.tokenizer.vocab_size(), tokenizer.vocab_size());
        let token = |of: &Tokenizer, id: u32| of.id_to_token(id);
        let other = (0..mine.max(its) as u32)
            .find(|id| token(&self.tokenizer, *id) != token(tokenizer, *id));
        let Some(id) = other else {
            return Ok(());
        };
        let spelled = |of: &Tokenizer| match token(of, id) {
            Some(token) => format!("{token:?}"),
            None => "no token".into(),
        };
        Err(Error::InvalidRequest(format!(
            "draft_model must have the model's vocabulary: id {id} is {} in {} and {} in the model",
            spelled(&self.tokenizer),
            self.name,
            spelled(tokenizer)
        )))
    }
}
