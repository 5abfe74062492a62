//! A directory with `config.json` and safetensors files into [`Weights`]. Tensor names stay as they are in the files.
//!
//! Format: 8 bytes of header length, a JSON header, then the tensors without gaps (huggingface/safetensors README). The
//! header is read here rather than with that crate, which takes the last of two tensors of one name.

use std::collections::{BTreeSet, HashMap};
use std::fmt;
use std::fs;
use std::io::{self, ErrorKind, Read};
use std::ops::Range;
use std::path::{Component, Path};

use hfcore_kernels::mmap::Mapped;
use hfcore_kernels::quant::TensorType;
use serde::Deserialize;
use serde::de::{Error as _, MapAccess, Visitor};
use serde_json::Value as Json;

use crate::checkpoint::Scheme;
use crate::error::{Error, Result};
use crate::quantised::{Dtype, Part};
use crate::weights::{TensorInfo, Weights};

/// The safetensors library's own cap on a header.
const MAX_HEADER: usize = 100_000_000;
const MAX_CONFIG: u64 = 16 << 20;
const MAX_INDEX: u64 = 64 << 20;

pub(crate) const CONFIG: &str = "config.json";
pub(crate) const SINGLE: &str = "model.safetensors";
pub(crate) const ADAPTER_CONFIG: &str = "adapter_config.json";
pub(crate) const ADAPTER: &str = "adapter_model.safetensors";
pub(crate) const INDEX: &str = "model.safetensors.index.json";

/// Buffers that old checkpoints carry as integers and that no model reads.
const IGNORED: [&str; 3] = ["position_ids", "token_type_ids", "num_batches_tracked"];

/// Map the checkpoint in `dir`: `config.json`, and `model.safetensors` or the files that `model.safetensors.index.json`
/// names; `generation_config.json` where there is one.
///
/// # Errors
/// [`Error::ModelFile`] where a file is missing, cut short or inconsistent; [`Error::Unsupported`] for an
/// unknown quantisation, or a dtype other than F32, F16 and BF16 that is no part of a quantised matrix.
pub fn open(dir: &Path) -> Result<Weights> {
    let config = object(&dir.join(CONFIG), MAX_CONFIG)?.ok_or_else(|| {
        file_error(
            &dir.join(CONFIG),
            "no such file; a safetensors checkpoint needs it",
        )
    })?;
    let scheme = Scheme::of(&config)?;
    let mut weights = Weights {
        path: dir.display().to_string(),
        files: Vec::new(),
        tensors: HashMap::new(),
        packed: HashMap::new(),
        quantised: HashMap::new(),
        metadata: HashMap::new(),
        config: Some(config),
        generation_config: object(&dir.join("generation_config.json"), MAX_CONFIG)?,
    };
    if dir.join(SINGLE).exists() {
        add_file(&mut weights, &dir.join(SINGLE))?;
        scheme.gather(&mut weights)?;
        return Ok(weights);
    }
    let index = dir.join(INDEX);
    let weight_map = weight_map(&index)?.ok_or_else(|| {
        weights.problem(format!(
            "has neither {SINGLE} nor {INDEX}; pickled weights (.bin, .pt) are not read"
        ))
    })?;
    let names: BTreeSet<&String> = weight_map.values().collect();
    for name in &names {
        add_file(&mut weights, &dir.join(name))?;
    }
    for (tensor, name) in &weight_map {
        let packed = weights.packed.get(tensor).map(|t| t.file);
        let file = weights.tensors.get(tensor).map(|t| t.file).or(packed);
        let wanted = names.iter().position(|n| n == &name);
        if file != wanted && !is_ignored(tensor) {
            return Err(file_error(
                &index,
                format!("says that {name:?} holds the tensor {tensor:?}, it does not"),
            ));
        }
    }
    scheme.gather(&mut weights)?;
    Ok(weights)
}

/// Map the PEFT adapter in `dir`: `adapter_config.json`, which becomes `config`, and `adapter_model.safetensors`.
///
/// # Errors
/// As [`open`].
pub fn open_adapter(dir: &Path) -> Result<Weights> {
    let config = dir.join(ADAPTER_CONFIG);
    let Some(config) = object(&config, MAX_CONFIG)? else {
        let problem = "no such file; an adapter is a directory that PEFT has saved";
        return Err(file_error(&config, problem));
    };
    let scheme = Scheme::of(&config)?;
    let mut weights = Weights {
        path: dir.display().to_string(),
        files: Vec::new(),
        tensors: HashMap::new(),
        packed: HashMap::new(),
        quantised: HashMap::new(),
        metadata: HashMap::new(),
        config: Some(config),
        generation_config: None,
    };
    let file = dir.join(ADAPTER);
    if !file.exists() {
        let problem = "no such file; pickled weights (.bin) are not read";
        return Err(file_error(&file, problem));
    }
    add_file(&mut weights, &file)?;
    scheme.gather(&mut weights)?;
    Ok(weights)
}

fn file_error(path: &Path, problem: impl Into<String>) -> Error {
    Error::ModelFile {
        path: path.display().to_string(),
        problem: problem.into(),
    }
}

// JSON files

/// The JSON object in a file of at most `cap` bytes; `None` where there is no such file.
fn object(path: &Path, cap: u64) -> Result<Option<Json>> {
    let Some(text) = read_capped(path, cap)? else {
        return Ok(None);
    };
    let json: Json =
        serde_json::from_slice(&text).map_err(|e| file_error(path, format!("not JSON: {e}")))?;
    if !json.is_object() {
        return Err(file_error(path, "should be a JSON object"));
    }
    Ok(Some(json))
}

fn read_capped(path: &Path, cap: u64) -> Result<Option<Vec<u8>>> {
    let error = |e: io::Error| file_error(path, e.to_string());
    match fs::metadata(path) {
        Ok(m) if m.is_file() => {}
        Ok(_) => return Err(file_error(path, "not a regular file")),
        Err(e) if e.kind() == ErrorKind::NotFound => return Ok(None),
        Err(e) => return Err(error(e)),
    }
    let mut text = Vec::new();
    let file = fs::File::open(path).map_err(error)?;
    file.take(cap + 1).read_to_end(&mut text).map_err(error)?;
    if text.len() as u64 > cap {
        return Err(file_error(
            path,
            format!("has more than the {cap} bytes that are read"),
        ));
    }
    Ok(Some(text))
}

/// The index: tensor name to file name, each a plain name in the same directory.
fn weight_map(path: &Path) -> Result<Option<HashMap<String, String>>> {
    #[derive(Deserialize)]
    struct Index {
        weight_map: HashMap<String, String>,
    }
    let Some(text) = read_capped(path, MAX_INDEX)? else {
        return Ok(None);
    };
    let index: Index = serde_json::from_slice(&text)
        .map_err(|e| file_error(path, format!("not an index: {e}")))?;
    for name in index.weight_map.values() {
        if !is_plain_name(name) {
            return Err(file_error(
                path,
                format!("names the file {name:?}, wanted one in the same directory"),
            ));
        }
    }
    Ok(Some(index.weight_map))
}

fn is_plain_name(name: &str) -> bool {
    let mut parts = Path::new(name).components();
    let one = matches!(parts.next(), Some(Component::Normal(_))) && parts.next().is_none();
    one && !name.contains(['/', '\\', ':', '\0'])
}

// One safetensors file

fn add_file(weights: &mut Weights, path: &Path) -> Result<()> {
    let mapped = Mapped::open(path).map_err(|e| file_error(path, e.to_string()))?;
    let file = weights.files.len();
    for (name, stored) in parse(&mapped, path)? {
        if weights.tensors.contains_key(&name) || weights.packed.contains_key(&name) {
            return Err(file_error(
                path,
                format!("has the tensor {name:?} a second time"),
            ));
        }
        match stored {
            Stored::Tensor(info) => {
                weights.tensors.insert(name, TensorInfo { file, ..info });
            }
            Stored::Packed(info) => {
                weights.packed.insert(name, Part { file, ..info });
            }
        }
    }
    weights.files.push(mapped);
    Ok(())
}

/// An entry of a file; its `file` is 0.
enum Stored {
    Tensor(TensorInfo),
    Packed(Part),
}

/// The header's entries in the order of the file, duplicates kept.
struct Header(Vec<(String, Entry)>);

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl<'de> Deserialize<'de> for Header {
    fn deserialize<D: serde::Deserializer<'de>>(
        deserializer: D,
    ) -> std::result::Result<Self, D::Error> {
        struct Entries;
        impl<'de> Visitor<'de> for Entries {
            type Value = Header;

            fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str("an object of tensors")
            }

            fn visit_map<A: MapAccess<'de>>(
                self,
                mut map: A,
            ) -> std::result::Result<Header, A::Error> {
                let mut entries = Vec::new();
                while let Some(name) = map.next_key::<String>()? {
                    if name == "__metadata__" {
                        map.next_value::<HashMap<String, String>>()?;
                        continue;
                    }
                    let entry = map
                        .next_value()
                        .map_err(|e| A::Error::custom(format!("tensor {name:?}: {e}")))?;
                    entries.push((name, entry));
                }
                Ok(Header(entries))
            }
        }
        deserializer.deserialize_map(Entries)
    }
}

/// The tensors of one file with their absolute byte ranges.
fn parse(bytes: &[u8], path: &Path) -> Result<Vec<(String, Stored)>> {
    let error = |problem: String| file_error(path, problem);
    let (header, start) = header_bytes(bytes).map_err(error)?;
    let header: Header =
        serde_json::from_slice(header).map_err(|e| error(format!("the header is wrong: {e}")))?;
    let mut entries = header.0;
    entries.sort_by_key(|(_, e)| e.data_offsets);
    let (mut end, mut tensors) = (0, Vec::with_capacity(entries.len()));
    for (name, entry) in entries {
        let (from, to) = entry.data_offsets;
        if from != end || to < from {
            let problem = format!(
                "tensor {name:?} has the bytes {from} to {to}, the one before it ends at {end}"
            );
            return Err(error(problem));
        }
        end = to;
        if to > bytes.len() - start {
            let left = bytes.len() - start;
            return Err(error(format!(
                "cut short: tensor {name:?} ends at byte {to}, the file has {left}"
            )));
        }
        if !is_ignored(&name) {
            let range = start + from..start + to;
            let found = stored(&name, entry, range, path)?;
            tensors.push((name, found));
        }
    }
    if end != bytes.len() - start {
        return Err(error(format!(
            "has {} bytes of tensors, its header describes {end}",
            bytes.len() - start
        )));
    }
    Ok(tensors)
}

/// The JSON header, and where it ends.
fn header_bytes(bytes: &[u8]) -> std::result::Result<(&[u8], usize), String> {
    if bytes.starts_with(b"version https://git-lfs") {
        return Err("a Git LFS pointer, not the model itself; fetch it with `git lfs pull`".into());
    }
    let Some((length, rest)) = bytes.split_first_chunk() else {
        return Err(format!(
            "cut short: a safetensors file has at least 8 bytes, this has {}",
            bytes.len()
        ));
    };
    let length = u64::from_le_bytes(*length);
    let n = usize::try_from(length).ok().filter(|n| *n <= MAX_HEADER);
    let n = n.ok_or_else(|| {
        format!("not a safetensors file: its header would have {length} bytes, at most {MAX_HEADER} are read")
    })?;
    let header = rest.get(..n).ok_or_else(|| {
        format!(
            "cut short: the header needs {n} bytes, {} are left",
            rest.len()
        )
    })?;
    Ok((header, 8 + n))
}

/// Floats are a tensor of the model, all else may be a part of one.
fn stored(name: &str, entry: Entry, bytes: Range<usize>, path: &Path) -> Result<Stored> {
    let Some(dtype) = Dtype::from_name(&entry.dtype) else {
        return Err(Error::Unsupported {
            what: "dtype",
            name: format!("{} of {name}", entry.dtype),
            supported: "F32, F16, BF16".into(),
        });
    };
    let (shape, file) = (entry.shape, 0);
    let elements = shape.iter().try_fold(1_usize, |n, dim| n.checked_mul(*dim));
    if elements.and_then(|n| n.checked_mul(dtype.size())) != Some(bytes.len()) {
        let (n, name_of) = (bytes.len(), dtype.name());
        let problem = format!("tensor {name:?} of shape {shape:?} in {name_of} has {n} bytes");
        return Err(file_error(path, problem));
    }
    let tensor_type = match dtype {
        Dtype::F32 => TensorType::F32,
        Dtype::F16 => TensorType::F16,
        Dtype::BF16 => TensorType::BF16,
        _ => {
            return Ok(Stored::Packed(Part {
                dtype,
                shape,
                file,
                bytes,
            }));
        }
    };
    Ok(Stored::Tensor(TensorInfo {
        tensor_type,
        shape,
        file,
        bytes,
    }))
}

fn is_ignored(name: &str) -> bool {
    name.rsplit('.')
        .next()
        .is_some_and(|last| IGNORED.contains(&last))
}
