//! A GGUF file, or the parts of a split one, into [`Weights`]. The file is hostile until each number in it was checked.
//!
//! Format: versions 2 and 3, little-endian, as ggml's `docs/gguf.md` describes them. Tensors stay where they are in the
//! memory map; only metadata is copied.

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};

use hfcore_kernels::mmap::Mapped;
use hfcore_kernels::quant::TensorType;

use crate::error::{Error, Result};
use crate::weights::{TensorInfo, Value, Weights};

pub mod write;

/// Keys in one file. Real ones have about 40.
const MAX_KEYS: usize = 1 << 16;
/// Tensors in one file. Real ones have up to some thousands.
const MAX_TENSORS: usize = 1 << 20;
/// Array elements in one file, all arrays together. The largest vocabularies have about 2^18 tokens in three arrays.
const MAX_ELEMENTS: usize = 1 << 24;
/// Bytes of a key or tensor name.
const MAX_NAME: usize = 1024;
const MAX_ALIGNMENT: usize = 1 << 16;
const MAX_DIMS: u32 = 4;

/// Map the GGUF file at `path` and check everything in it. Of a split model (`...-00001-of-00003.gguf`) any part will do;
/// all parts must lie in one directory, and the metadata is that of the first.
///
/// # Errors
/// [`Error::ModelFile`] where the file is missing, cut short or inconsistent; [`Error::Unsupported`] for another version,
/// byte order or tensor type.
pub fn open(path: &Path) -> Result<Weights> {
    let paths = part_paths(path);
    let mut weights = Weights {
        path: path.display().to_string(),
        files: Vec::new(),
        tensors: HashMap::new(),
        metadata: HashMap::new(),
        config: None,
        generation_config: None,
        packed: HashMap::new(),
        quantised: HashMap::new(),
    };
    for (index, part) in paths.iter().enumerate() {
        add_part(&mut weights, part, index, paths.len())?;
    }
    check_tensor_count(&weights)?;
    Ok(weights)
}

fn add_part(weights: &mut Weights, path: &Path, index: usize, count: usize) -> Result<()> {
    let name = path.display().to_string();
    let error = |problem: String| Error::ModelFile {
        path: name.clone(),
        problem,
    };
    let mapped = Mapped::open(path).map_err(|e| match count {
        1 => error(e.to_string()),
        _ => error(format!("part {} of {count}: {e}", index + 1)),
    })?;
    let part = parse(&mapped, &name)?;
    check_split(&part, index, count, &name)?;
    for (tensor, mut info) in part.tensors {
        if weights.tensors.contains_key(&tensor) {
            return Err(error(format!(
                "tensor {tensor:?} is in an earlier part too"
            )));
        }
        info.file = index;
        weights.tensors.insert(tensor, info);
    }
    if index == 0 {
        weights.metadata = part.metadata;
    }
    weights.files.push(mapped);
    Ok(())
}

// Split files

/// Where `name` is `prefix-00002-of-00005.gguf`: the prefix, 2 and 5.
pub(crate) fn split_name(name: &str) -> Option<(&str, usize, usize)> {
    let (rest, count) = name.strip_suffix(".gguf")?.rsplit_once("-of-")?;
    let (prefix, number) = rest.rsplit_once('-')?;
    let five_digits = |s: &str| {
        (s.len() == 5 && s.bytes().all(|b| b.is_ascii_digit())).then(|| s.parse().ok())?
    };
    let (number, count) = (five_digits(number)?, five_digits(count)?);
    (1..=count)
        .contains(&number)
        .then_some((prefix, number, count))
}

/// All parts of the model that `path` is a part of, in order; just `path` where its name is not that of a part.
fn part_paths(path: &Path) -> Vec<PathBuf> {
    let Some((prefix, _, count)) = path
        .file_name()
        .and_then(|n| n.to_str())
        .and_then(split_name)
    else {
        return vec![path.to_path_buf()];
    };
    (1..=count)
        .map(|i| path.with_file_name(format!("{prefix}-{i:05}-of-{count:05}.gguf")))
        .collect()
}

/// The part must say what its name says.
fn check_split(part: &Contents, index: usize, count: usize, path: &str) -> Result<()> {
    let check = |key: &str, allowed: &[usize]| {
        let got = part
            .metadata
            .get(key)
            .map_or("nothing".into(), Value::describe);
        if allowed.iter().any(|n| got == n.to_string()) || (count == 1 && got == "nothing") {
            return Ok(());
        }
        let problem = format!(
            "metadata {key:?} should be {} in a file of this name, got {got}; \
             parts are named like model-00001-of-00003.gguf",
            allowed[0]
        );
        Err(Error::ModelFile {
            path: path.into(),
            problem,
        })
    };
    // Parts that were merged again say 0.
    check(
        "split.count",
        if count == 1 {
            &[1, 0]
        } else {
            std::slice::from_ref(&count)
        },
    )?;
    check("split.no", &[index])
}

/// A split model's first part says how many tensors all parts have together.
fn check_tensor_count(weights: &Weights) -> Result<()> {
    let got = weights.tensors.len();
    match weights.get_usize("split.tensors.count")? {
        Some(n) if n != got => Err(weights.problem(format!(
            "says that the model has {n} tensors, its parts hold {got}"
        ))),
        _ => Ok(()),
    }
}

// One file

/// Keys, each with the bytes that it and its value take.
type Entries = Vec<(String, Range<usize>)>;

/// What one file holds. The ranges of its tensors are absolute; their `file` is 0.
#[derive(Debug)]
struct Contents {
    metadata: HashMap<String, Value>,
    /// Where each key with its value stands, in the order of the file.
    entries: Entries,
    tensors: HashMap<String, TensorInfo>,
}

fn parse(bytes: &[u8], path: &str) -> Result<Contents> {
    let mut r = Reader {
        bytes,
        at: 0,
        path,
        elements_left: MAX_ELEMENTS,
    };
    r.magic_and_version()?;
    // The least a tensor takes: name length and one byte, dimensions count, one dimension, type, offset.
    let tensor_count = r.count("tensors", 8 + 1 + 4 + 8 + 4 + 8, MAX_TENSORS)?;
    // The least a key takes: its length and one byte, the type, one byte of value.
    let key_count = r.count("keys", 8 + 1 + 4 + 1, MAX_KEYS)?;
    let (metadata, entries) = r.metadata(key_count)?;
    let alignment = r.alignment(&metadata)?;
    let tensors = r.tensors(tensor_count, alignment)?;
    Ok(Contents {
        metadata,
        entries,
        tensors,
    })
}

/// A cursor that never leaves the file.
struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    path: &'a str,
    elements_left: usize,
}

/// A tensor as the header describes it; `offset` counts from the data section.
struct Described<'a> {
    name: &'a str,
    tensor_type: TensorType,
    shape: Vec<usize>,
    offset: usize,
    bytes: usize,
}

impl<'a> Reader<'a> {
    fn error(&self, problem: impl Into<String>) -> Error {
        Error::ModelFile {
            path: self.path.into(),
            problem: problem.into(),
        }
    }

    fn left(&self) -> usize {
        self.bytes.len() - self.at
    }

    fn take(&mut self, n: usize, what: &str) -> Result<&'a [u8]> {
        let Some(taken) = self.bytes[self.at..].get(..n) else {
            let (at, left) = (self.at, self.left());
            return Err(self.error(format!(
                "cut short: {what} at byte {at} needs {n} bytes, {left} are left"
            )));
        };
        self.at += n;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    fn u32(&mut self, what: &str) -> Result<u32> {
        self.array(what).map(u32::from_le_bytes)
    }

    /// A size, offset or length: 64 bits in the file.
    fn size(&mut self, what: &str) -> Result<usize> {
        let n = u64::from_le_bytes(self.array(what)?);
        usize::try_from(n).map_err(|_| {
            self.error(format!(
                "{what} of {n} is more than this machine can address"
            ))
        })
    }

    /// How many of `what` follow, each at least `least` bytes long: bounded before anything is allocated.
    fn count(&mut self, what: &str, least: usize, cap: usize) -> Result<usize> {
        let n = self.size(what)?;
        let most = (self.left() / least).min(cap);
        if n > most {
            return Err(self.error(format!("says it has {n} {what}, at most {most} can follow")));
        }
        Ok(n)
    }

    fn string(&mut self, what: &str) -> Result<&'a str> {
        let n = self.size(what)?;
        let bytes = self.take(n, what)?;
        std::str::from_utf8(bytes).map_err(|e| self.error(format!("{what} is not UTF-8: {e}")))
    }

    fn name(&mut self, what: &str) -> Result<&'a str> {
        let name = self.string(what)?;
        if name.is_empty() || name.len() > MAX_NAME {
            return Err(self.error(format!(
                "{what} should have 1 to {MAX_NAME} bytes, got {}",
                name.len()
            )));
        }
        Ok(name)
    }

    fn magic_and_version(&mut self) -> Result<()> {
        let start = &self.bytes[..self.bytes.len().min(23)];
        if start.starts_with(b"version https://git-lfs") {
            return Err(
                self.error("a Git LFS pointer, not the model itself; fetch it with `git lfs pull`")
            );
        }
        if !start.starts_with(b"GGUF") {
            let start = start[..start.len().min(4)].escape_ascii();
            return Err(self.error(format!("not a GGUF file (starts with \"{start}\")")));
        }
        self.at = 4;
        let version = self.u32("the version")?;
        let name = match version {
            2 | 3 => return Ok(()),
            v if v != 0 && v & 0xffff == 0 => format!("v{}, big-endian", v.swap_bytes()),
            v => format!("v{v}"),
        };
        Err(Error::Unsupported {
            what: "GGUF version",
            name,
            supported: "v2 and v3, little-endian".into(),
        })
    }

    // Metadata

    fn metadata(&mut self, count: usize) -> Result<(HashMap<String, Value>, Entries)> {
        let mut metadata = HashMap::with_capacity(count);
        let mut entries = Vec::with_capacity(count);
        for _ in 0..count {
            let start = self.at;
            let key = self.name("a key")?;
            let type_id = self.u32(key)?;
            let value = if type_id == 9 {
                self.array_value(key)?
            } else {
                self.scalar(key, type_id)?
            };
            if metadata.insert(key.to_string(), value).is_some() {
                return Err(self.error(format!("has the key {key:?} twice")));
            }
            entries.push((key.to_string(), start..self.at));
        }
        Ok((metadata, entries))
    }

    fn scalar(&mut self, key: &str, type_id: u32) -> Result<Value> {
        let int = |n: u64| i64::try_from(n).map_or(Value::UInt(n), Value::Int);
        Ok(match type_id {
            0 => Value::Int(u8::from_le_bytes(self.array(key)?).into()),
            1 => Value::Int(i8::from_le_bytes(self.array(key)?).into()),
            2 => Value::Int(u16::from_le_bytes(self.array(key)?).into()),
            3 => Value::Int(i16::from_le_bytes(self.array(key)?).into()),
            4 => Value::Int(u32::from_le_bytes(self.array(key)?).into()),
            5 => Value::Int(i32::from_le_bytes(self.array(key)?).into()),
            6 => Value::Float(f32::from_le_bytes(self.array(key)?).into()),
            7 => Value::Bool(self.truth(key)?),
            8 => Value::String(self.string(key)?.to_string()),
            10 => int(u64::from_le_bytes(self.array(key)?)),
            11 => Value::Int(i64::from_le_bytes(self.array(key)?)),
            12 => Value::Float(f64::from_le_bytes(self.array(key)?)),
            _ => {
                return Err(self.error(format!(
                    "metadata {key:?} has a type of {type_id}, wanted 0 to 12"
                )));
            }
        })
    }

    fn truth(&mut self, key: &str) -> Result<bool> {
        match self.array(key)? {
            [0] => Ok(false),
            [1] => Ok(true),
            [n] => Err(self.error(format!("metadata {key:?} should be 0 or 1, got {n}"))),
        }
    }

    fn array_value(&mut self, key: &str) -> Result<Value> {
        let type_id = self.u32(key)?;
        match type_id {
            0 => self.numbers(key, |b: [u8; 1]| b[0].into()).map(Value::Ints),
            1 => self
                .numbers(key, |b| i8::from_le_bytes(b).into())
                .map(Value::Ints),
            2 => self
                .numbers(key, |b| u16::from_le_bytes(b).into())
                .map(Value::Ints),
            3 => self
                .numbers(key, |b| i16::from_le_bytes(b).into())
                .map(Value::Ints),
            4 => self
                .numbers(key, |b| u32::from_le_bytes(b).into())
                .map(Value::Ints),
            5 => self
                .numbers(key, |b| i32::from_le_bytes(b).into())
                .map(Value::Ints),
            6 => self.numbers(key, f32::from_le_bytes).map(Value::Floats),
            7 => (0..self.array_len(key, 1)?)
                .map(|_| self.truth(key))
                .collect::<Result<_>>()
                .map(Value::Bools),
            8 => self.strings(key).map(Value::Strings),
            9 => Err(Error::Unsupported {
                what: "metadata",
                name: format!("{key}, an array of arrays"),
                supported: "arrays of numbers, strings, true and false".into(),
            }),
            10 => self.unsigned(key).map(Value::Ints),
            11 => self.numbers(key, i64::from_le_bytes).map(Value::Ints),
            12 => self
                .numbers(key, |b| f64::from_le_bytes(b) as f32)
                .map(Value::Floats),
            _ => Err(self.error(format!(
                "metadata {key:?} is an array of type {type_id}, wanted 0 to 12"
            ))),
        }
    }

    /// The length of an array whose elements take at least `least` bytes each.
    fn array_len(&mut self, key: &str, least: usize) -> Result<usize> {
        let n = self.size(key)?;
        let most = (self.left() / least).min(self.elements_left);
        if n > most {
            return Err(self.error(format!(
                "metadata {key:?} says it has {n} elements, at most {most} can follow"
            )));
        }
        self.elements_left -= n;
        Ok(n)
    }

    fn numbers<const N: usize, T>(
        &mut self,
        key: &str,
        number: impl Fn([u8; N]) -> T,
    ) -> Result<Vec<T>> {
        let n = self.array_len(key, N)?;
        Ok(self
            .take(n * N, key)?
            .as_chunks()
            .0
            .iter()
            .map(|b| number(*b))
            .collect())
    }

    fn unsigned(&mut self, key: &str) -> Result<Vec<i64>> {
        let numbers = self.numbers(key, u64::from_le_bytes)?;
        let fits = numbers
            .into_iter()
            .map(i64::try_from)
            .collect::<std::result::Result<_, _>>();
        fits.map_err(|_| {
            self.error(format!(
                "metadata {key:?} has an element above {}",
                i64::MAX
            ))
        })
    }

    fn strings(&mut self, key: &str) -> Result<Vec<String>> {
        let n = self.array_len(key, 8)?;
        (0..n)
            .map(|_| self.string(key).map(str::to_string))
            .collect()
    }

    fn alignment(&self, metadata: &HashMap<String, Value>) -> Result<usize> {
        let Some(value) = metadata.get("general.alignment") else {
            return Ok(32);
        };
        let alignment = match value {
            Value::Int(n) => usize::try_from(*n).ok(),
            _ => None,
        };
        alignment.filter(|n| n.is_power_of_two() && (8..=MAX_ALIGNMENT).contains(n)).ok_or_else(|| {
            let got = value.describe();
            self.error(format!(
                "metadata \"general.alignment\" should be a power of two from 8 to {MAX_ALIGNMENT}, got {got}"
            ))
        })
    }

    // Tensors

    fn tensors(&mut self, count: usize, alignment: usize) -> Result<HashMap<String, TensorInfo>> {
        let mut described = Vec::with_capacity(count);
        for _ in 0..count {
            described.push(self.tensor(alignment)?);
        }
        described.sort_by_key(|t| t.offset);
        let start = self.at.next_multiple_of(alignment);
        let mut end = start;
        let mut tensors = HashMap::with_capacity(count);
        for t in described {
            let bytes = self.place(&t, start)?;
            if bytes.start < end {
                return Err(self.error(format!("tensor {:?} overlaps the one before it", t.name)));
            }
            end = bytes.end;
            let info = TensorInfo {
                tensor_type: t.tensor_type,
                shape: t.shape,
                file: 0,
                bytes,
            };
            if tensors.insert(t.name.to_string(), info).is_some() {
                return Err(self.error(format!("has the tensor {:?} twice", t.name)));
            }
        }
        Ok(tensors)
    }

    fn tensor(&mut self, alignment: usize) -> Result<Described<'a>> {
        let name = self.name("a tensor name")?;
        let shape = self.shape(name)?;
        let tensor_type = self.tensor_type(name)?;
        let offset = self.size(name)?;
        if !offset.is_multiple_of(alignment) {
            return Err(self.error(format!(
                "tensor {name:?} lies at {offset}, no multiple of {alignment}"
            )));
        }
        let bytes = self.tensor_bytes(name, tensor_type, &shape)?;
        Ok(Described {
            name,
            tensor_type,
            shape,
            offset,
            bytes,
        })
    }

    /// The dimensions, turned: the file has the innermost first.
    fn shape(&mut self, name: &str) -> Result<Vec<usize>> {
        let dims = self.u32(name)?;
        if !(1..=MAX_DIMS).contains(&dims) {
            return Err(self.error(format!(
                "tensor {name:?} has {dims} dimensions, wanted 1 to {MAX_DIMS}"
            )));
        }
        let mut shape = (0..dims)
            .map(|_| self.size(name))
            .collect::<Result<Vec<_>>>()?;
        shape.reverse();
        if shape.contains(&0) {
            return Err(self.error(format!("tensor {name:?} is empty: its shape is {shape:?}")));
        }
        Ok(shape)
    }

    fn tensor_type(&mut self, name: &str) -> Result<TensorType> {
        let id = self.u32(name)?;
        TensorType::from_id(id).ok_or_else(|| Error::Unsupported {
            what: "tensor type",
            name: format!("{} (id {id}) of {name}", foreign_type(id)),
            supported: TensorType::GGUF.map(TensorType::name).join(", "),
        })
    }

    fn tensor_bytes(&self, name: &str, tensor_type: TensorType, shape: &[usize]) -> Result<usize> {
        let (rows, cols) = shape
            .split_last()
            .map_or((&[][..], 1), |(cols, rows)| (rows, *cols));
        let (block, type_name) = (tensor_type.block_len(), tensor_type.name());
        if !cols.is_multiple_of(block) {
            return Err(self.error(format!(
                "tensor {name:?} has rows of {cols} numbers, {type_name} wants a multiple of {block}"
            )));
        }
        let row_bytes = tensor_type.row_bytes(cols);
        rows.iter()
            .fold(row_bytes, |bytes, n| bytes?.checked_mul(*n))
            .ok_or_else(|| {
                self.error(format!(
                    "tensor {name:?} of shape {shape:?} is larger than any memory"
                ))
            })
    }

    /// Where in the file the tensor lies, its data section beginning at `start`.
    fn place(&self, t: &Described, start: usize) -> Result<Range<usize>> {
        let range = start
            .checked_add(t.offset)
            .and_then(|from| Some(from..from.checked_add(t.bytes)?));
        range.filter(|r| r.end <= self.bytes.len()).ok_or_else(|| {
            let (file, name) = (self.bytes.len(), t.name);
            self.error(format!(
                "cut short: tensor {name:?} needs {} bytes at {start} + {}, the file has {file}",
                t.bytes, t.offset
            ))
        })
    }
}

/// The name of a type that GGUF has and we do not read.
fn foreign_type(id: u32) -> &'static str {
    match id {
        4 | 5 | 31..=33 | 36..=38 => "a type that GGUF has dropped",
        9 => "Q8_1",
        15 => "Q8_K",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        40 => "NVFP4",
        _ => "an unknown type",
    }
}

#[cfg(test)]
mod tests;
