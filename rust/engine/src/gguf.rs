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

/// What one file holds. The ranges of its tensors are absolute; their `file` is 0.
#[derive(Debug)]
struct Contents {
    metadata: HashMap<String, Value>,
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
    let metadata = r.metadata(key_count)?;
    let alignment = r.alignment(&metadata)?;
    let tensors = r.tensors(tensor_count, alignment)?;
    Ok(Contents { metadata, tensors })
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

    fn metadata(&mut self, count: usize) -> Result<HashMap<String, Value>> {
        let mut metadata = HashMap::with_capacity(count);
        for _ in 0..count {
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
        }
        Ok(metadata)
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
            supported: TensorType::ALL.map(TensorType::name).join(", "),
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
        16 => "IQ2_XXS",
        17 => "IQ2_XS",
        18 => "IQ3_XXS",
        19 => "IQ1_S",
        21 => "IQ3_S",
        22 => "IQ2_S",
        24 => "I8",
        25 => "I16",
        26 => "I32",
        27 => "I64",
        28 => "F64",
        29 => "IQ1_M",
        34 => "TQ1_0",
        35 => "TQ2_0",
        40 => "NVFP4",
        _ => "an unknown type",
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Bytes of a GGUF file, written piece by piece so that each can be made wrong.
    #[derive(Clone)]
    struct Writer {
        keys: Vec<(Vec<u8>, u32, Vec<u8>)>,
        tensors: Vec<(Vec<u8>, Vec<u64>, u32, u64)>,
        data: Vec<u8>,
    }

    fn string(s: impl AsRef<[u8]>) -> Vec<u8> {
        [&(s.as_ref().len() as u64).to_le_bytes()[..], s.as_ref()].concat()
    }

    fn array(type_id: u32, n: u64, elements: &[u8]) -> Vec<u8> {
        [&type_id.to_le_bytes()[..], &n.to_le_bytes(), elements].concat()
    }

    impl Writer {
        /// Two tensors: `a` of F32 [2, 4], `b` of Q8_0 [32].
        fn new() -> Self {
            let tensors = vec![
                (b"a".to_vec(), vec![4, 2], 0, 0),
                (b"b".to_vec(), vec![32], 8, 32),
            ];
            let keys = vec![(b"general.name".to_vec(), 8, string("tiny"))];
            Self {
                keys,
                tensors,
                data: (0..32 + 34).collect(),
            }
        }

        fn key(mut self, key: impl AsRef<[u8]>, type_id: u32, value: &[u8]) -> Self {
            self.keys
                .push((key.as_ref().to_vec(), type_id, value.to_vec()));
            self
        }

        fn tensor(
            mut self,
            name: impl AsRef<[u8]>,
            dims: &[u64],
            type_id: u32,
            offset: u64,
        ) -> Self {
            self.tensors
                .push((name.as_ref().to_vec(), dims.to_vec(), type_id, offset));
            self
        }

        fn write(&self) -> Vec<u8> {
            let counts = [self.tensors.len() as u64, self.keys.len() as u64].map(u64::to_le_bytes);
            let mut b = [b"GGUF", &3_u32.to_le_bytes()[..], &counts.concat()].concat();
            for (key, type_id, value) in &self.keys {
                b.extend([&string(key)[..], &type_id.to_le_bytes(), value].concat());
            }
            for (name, dims, type_id, offset) in &self.tensors {
                b.extend([&string(name)[..], &(dims.len() as u32).to_le_bytes()].concat());
                b.extend(dims.iter().flat_map(|d| d.to_le_bytes()));
                b.extend([&type_id.to_le_bytes()[..], &offset.to_le_bytes()].concat());
            }
            b.resize(b.len().next_multiple_of(32), 0);
            b.extend(&self.data);
            b
        }

        fn parse(&self) -> Result<Contents> {
            parse(&self.write(), "t.gguf")
        }

        /// Parsing must fail as [`Error::ModelFile`] with these words.
        fn refused(&self, words: &str) {
            refused(&self.write(), words);
        }
    }

    fn refused(bytes: &[u8], words: &str) {
        match parse(bytes, "t.gguf").unwrap_err() {
            Error::ModelFile { path, problem } => {
                assert_eq!(path, "t.gguf");
                assert!(problem.contains(words), "{problem}");
            }
            other => panic!("{other}"),
        }
    }

    #[test]
    fn tensors_have_their_shape_outermost_first_and_their_place() {
        let bytes = Writer::new().write();
        let tensors = parse(&bytes, "t").unwrap().tensors;
        let start = bytes.len() - 66;
        assert_eq!(
            (&tensors["a"].shape[..], tensors["a"].bytes.clone()),
            (&[2, 4][..], start..start + 32)
        );
        assert_eq!(
            (&tensors["b"].shape[..], tensors["b"].bytes.clone()),
            (&[32][..], start + 32..start + 66)
        );
        assert_eq!(tensors["b"].tensor_type, TensorType::Q8_0);
    }

    #[test]
    fn version_2_reads_like_version_3() {
        let mut bytes = Writer::new().write();
        bytes[4] = 2;
        assert_eq!(parse(&bytes, "t").unwrap().tensors.len(), 2);
    }

    #[test]
    fn every_kind_of_metadata_is_read() {
        let w = Writer::new()
            .key("u8", 0, &[200])
            .key("i8", 1, &[200])
            .key("u16", 2, &[1, 2])
            .key("i16", 3, &[255, 255])
            .key("u32", 4, &[255; 4])
            .key("i32", 5, &[255; 4])
            .key("f32", 6, &0.5f32.to_le_bytes())
            .key("bool", 7, &[1])
            .key("u64", 10, &[255; 8])
            .key("i64", 11, &[255; 8])
            .key("f64", 12, &0.25f64.to_le_bytes())
            .key("bytes", 9, &array(0, 2, &[7, 200]))
            .key("ints", 9, &array(5, 1, &[254, 255, 255, 255]))
            .key("longs", 9, &array(10, 1, &3_u64.to_le_bytes()))
            .key("floats", 9, &array(6, 1, &1.5f32.to_le_bytes()))
            .key("doubles", 9, &array(12, 1, &2.5f64.to_le_bytes()))
            .key("bools", 9, &array(7, 2, &[0, 1]))
            .key(
                "strings",
                9,
                &array(8, 2, &[string("é"), string("")].concat()),
            );
        let mut got: Vec<_> = w.parse().unwrap().metadata.into_iter().collect();
        got.sort_by(|a, b| a.0.cmp(&b.0));
        let got: Vec<_> = got.iter().map(|(k, v)| (k.as_str(), v.clone())).collect();
        let wanted = [
            ("bool", Value::Bool(true)),
            ("bools", Value::Bools(vec![false, true])),
            ("bytes", Value::Ints(vec![7, 200])),
            ("doubles", Value::Floats(vec![2.5])),
            ("f32", Value::Float(0.5)),
            ("f64", Value::Float(0.25)),
            ("floats", Value::Floats(vec![1.5])),
            ("general.name", Value::String("tiny".into())),
            ("i16", Value::Int(-1)),
            ("i32", Value::Int(-1)),
            ("i64", Value::Int(-1)),
            ("i8", Value::Int(-56)),
            ("ints", Value::Ints(vec![-2])),
            ("longs", Value::Ints(vec![3])),
            ("strings", Value::Strings(vec!["é".into(), "".into()])),
            ("u16", Value::Int(0x201)),
            ("u32", Value::Int(u32::MAX.into())),
            ("u64", Value::UInt(u64::MAX)),
            ("u8", Value::Int(200)),
        ];
        assert_eq!(got, wanted);
    }

    #[test]
    fn what_is_no_gguf_is_called_by_its_name() {
        refused(b"", "not a GGUF file (starts with \"\")");
        refused(
            b"PK\x03\x04 zip",
            "not a GGUF file (starts with \"PK\\x03\\x04\")",
        );
        refused(
            b"version https://git-lfs.github.com/spec/v1\noid",
            "a Git LFS pointer",
        );
        for (version, name) in [
            (1_u32.to_le_bytes(), "v1"),
            (3_u32.to_be_bytes(), "v3, big-endian"),
            ([9, 0, 0, 0], "v9"),
        ] {
            let mut bytes = Writer::new().write();
            bytes[4..8].copy_from_slice(&version);
            let error = parse(&bytes, "t").unwrap_err();
            assert!(
                matches!(&error, Error::Unsupported { what: "GGUF version", name: n, .. } if n == name),
                "{error}"
            );
        }
    }

    #[test]
    fn counts_are_bounded_by_the_file_before_anything_is_allocated() {
        let mut bytes = Writer::new().write();
        bytes[8..16].copy_from_slice(&(1_u64 << 40).to_le_bytes());
        refused(&bytes, "says it has 1099511627776 tensors, at most ");
        bytes[8..16].copy_from_slice(&1_u64.to_le_bytes());
        bytes[16..24].copy_from_slice(&u64::MAX.to_le_bytes());
        refused(&bytes, "says it has 18446744073709551615 keys, at most ");
        Writer::new()
            .key("k", 9, &array(8, 1 << 50, &[]))
            .refused("\"k\" says it has 1125899906842624 elements");
        Writer::new()
            .key("k", 9, &array(12, 1 << 61, &[]))
            .refused("\"k\" says it has 2305843009213693952 elements");
        Writer::new()
            .key("k", 8, &(1_u64 << 62).to_le_bytes())
            .refused("cut short: k at byte ");
        Writer::new()
            .key("k", 8, &u64::MAX.to_le_bytes())
            .refused("cut short: k at byte ");
    }

    #[test]
    fn arrays_together_stay_under_a_cap() {
        let half = array(
            0,
            MAX_ELEMENTS as u64 / 2 + 1,
            &vec![0; MAX_ELEMENTS / 2 + 1],
        );
        Writer::new()
            .key("a", 9, &half)
            .key("b", 9, &half)
            .refused("metadata \"b\" says it has 8388609 elements");
    }

    #[test]
    fn an_array_of_arrays_is_refused() {
        let error = Writer::new()
            .key("k", 9, &array(9, 1, &array(9, 1, &[])))
            .parse()
            .unwrap_err();
        assert_eq!(
            error.to_string().split(';').next(),
            Some("unsupported metadata \"k, an array of arrays\"")
        );
    }

    #[test]
    fn metadata_of_an_unknown_kind_is_refused() {
        Writer::new()
            .key("k", 13, &[0; 8])
            .refused("metadata \"k\" has a type of 13");
        Writer::new()
            .key("k", 9, &array(77, 1, &[0; 8]))
            .refused("metadata \"k\" is an array of type 77");
        Writer::new()
            .key("k", 7, &[2])
            .refused("metadata \"k\" should be 0 or 1, got 2");
        Writer::new()
            .key("k", 9, &array(10, 1, &[255; 8]))
            .refused("metadata \"k\" has an element above");
    }

    #[test]
    fn names_and_strings_are_utf_8_of_bounded_length() {
        Writer::new()
            .key([0xff], 0, &[1])
            .refused("a key is not UTF-8");
        Writer::new()
            .key("k", 8, &string([0xc3]))
            .refused("k is not UTF-8");
        Writer::new()
            .key("k", 9, &array(8, 1, &string([0xff])))
            .refused("k is not UTF-8");
        Writer::new()
            .tensor([0xff], &[1], 0, 96)
            .refused("a tensor name is not UTF-8");
        Writer::new()
            .key("", 0, &[1])
            .refused("a key should have 1 to 1024 bytes, got 0");
        Writer::new()
            .key("k".repeat(1025), 0, &[1])
            .refused("a key should have 1 to 1024 bytes, got 1025");
        Writer::new()
            .tensor("", &[1], 0, 96)
            .refused("a tensor name should have 1 to 1024 bytes, got 0");
    }

    #[test]
    fn nothing_may_be_there_twice() {
        Writer::new()
            .key("general.name", 8, &string("x"))
            .refused("has the key \"general.name\" twice");
        let mut w = Writer::new().tensor("a", &[1], 0, 96);
        w.data.resize(128, 0);
        w.refused("has the tensor \"a\" twice");
    }

    #[test]
    fn the_alignment_is_a_power_of_two() {
        let aligned = |n: u32| Writer::new().key("general.alignment", 4, &n.to_le_bytes());
        for bad in [0, 1, 24, 1 << 17, u32::MAX] {
            aligned(bad).refused(&format!(
                "\"general.alignment\" should be a power of two from 8 to 65536, got {bad}"
            ));
        }
        Writer::new()
            .key("general.alignment", 8, &string("32"))
            .refused("got the string \"32\"");
        aligned(16).parse().unwrap();
        aligned(64).refused("tensor \"b\" lies at 32, no multiple of 64");
    }

    #[test]
    fn shapes_have_one_to_four_dimensions_and_whole_blocks() {
        Writer::new()
            .tensor("c", &[], 0, 96)
            .refused("tensor \"c\" has 0 dimensions, wanted 1 to 4");
        Writer::new()
            .tensor("c", &[1; 5], 0, 96)
            .refused("tensor \"c\" has 5 dimensions");
        Writer::new()
            .tensor("c", &[4, 0], 0, 96)
            .refused("tensor \"c\" is empty: its shape is [0, 4]");
        Writer::new()
            .tensor("c", &[33], 8, 96)
            .refused("rows of 33 numbers, Q8_0 wants a multiple of 32");
        Writer::new()
            .tensor("c", &[1 << 40, 1 << 40], 0, 96)
            .refused("is larger than any memory");
        Writer::new()
            .tensor("c", &[u64::MAX], 0, 96)
            .refused("is larger than any memory");
    }

    #[test]
    fn tensors_lie_inside_the_file_and_apart() {
        Writer::new()
            .tensor("c", &[1], 0, 96)
            .refused("cut short: tensor \"c\" needs 4 bytes at ");
        Writer::new()
            .tensor("c", &[1], 0, u64::MAX - 31)
            .refused("cut short: tensor \"c\"");
        Writer::new()
            .tensor("c", &[1], 0, 1 << 40)
            .refused("cut short: tensor \"c\"");
        Writer::new()
            .tensor("c", &[1], 0, 33)
            .refused("tensor \"c\" lies at 33, no multiple of 32");
        Writer::new()
            .tensor("c", &[1], 0, 32)
            .refused("overlaps the one before it");
        let mut w = Writer::new().tensor("c", &[1], 0, 64);
        w.data.resize(96, 0);
        w.refused("tensor \"c\" overlaps the one before it");
    }

    #[test]
    fn a_foreign_tensor_type_is_named() {
        for (id, name) in [
            (16, "IQ2_XXS (id 16) of c"),
            (4, "a type that GGUF has dropped (id 4) of c"),
            (99, "99"),
        ] {
            match Writer::new()
                .tensor("c", &[256], id, 96)
                .parse()
                .unwrap_err()
            {
                Error::Unsupported {
                    what: "tensor type",
                    name: got,
                    supported,
                } => {
                    assert!(got.contains(name), "{got}");
                    assert!(supported.contains("Q4_K"), "{supported}");
                }
                other => panic!("{other}"),
            }
        }
    }

    #[test]
    fn a_file_cut_anywhere_is_refused() {
        let bytes = Writer::new()
            .key("k", 9, &array(8, 1, &string("token")))
            .write();
        for n in 0..bytes.len() {
            let error = parse(&bytes[..n], "t").unwrap_err();
            assert!(
                matches!(error, Error::ModelFile { .. }),
                "{n} bytes: {error}"
            );
        }
    }

    #[test]
    fn no_flipped_byte_leads_outside_the_file() {
        let bytes = Writer::new()
            .key("k", 9, &array(8, 1, &string("token")))
            .write();
        for i in 0..bytes.len() - 66 {
            for flip in [0x01, 0x80, 0xff] {
                let mut bad = bytes.clone();
                bad[i] ^= flip;
                if let Ok(contents) = parse(&bad, "t") {
                    assert!(
                        contents.tensors.values().all(|t| t.bytes.end <= bad.len()),
                        "byte {i}"
                    );
                }
            }
        }
    }

    #[test]
    fn the_name_of_a_part_tells_its_number() {
        assert_eq!(split_name("m-00002-of-00005.gguf"), Some(("m", 2, 5)));
        assert_eq!(split_name("m-00000-of-00005.gguf"), None);
        assert_eq!(split_name("m-00006-of-00005.gguf"), None);
        assert_eq!(split_name("m-2-of-5.gguf"), None);
        assert_eq!(split_name("m-+0002-of-00005.gguf"), None);
        assert_eq!(split_name("m.gguf"), None);
    }

    /// One part of three: `no`, with one tensor of `name`.
    fn part(no: u16, name: &str) -> Writer {
        let mut w = Writer::new()
            .key("split.no", 2, &no.to_le_bytes())
            .key("split.count", 2, &3_u16.to_le_bytes())
            .key("split.tensors.count", 5, &3_i32.to_le_bytes());
        w.tensors = vec![(name.into(), vec![8], 0, 0)];
        w
    }

    /// Write the files to a directory of their own, open one of them.
    fn open_among(test: &str, files: &[(&str, &Writer)], name: &str) -> Result<Weights> {
        let dir = std::env::temp_dir().join(format!("hfcore-gguf-{}-{test}", std::process::id()));
        std::fs::create_dir_all(&dir).unwrap();
        for (name, writer) in files {
            std::fs::write(dir.join(name), writer.write()).unwrap();
        }
        let weights = open(&dir.join(name));
        std::fs::remove_dir_all(&dir).unwrap();
        weights
    }

    const PARTS: [&str; 3] = [
        "m-00001-of-00003.gguf",
        "m-00002-of-00003.gguf",
        "m-00003-of-00003.gguf",
    ];

    #[test]
    fn any_part_opens_the_whole_split_model() {
        let parts = [
            part(0, "a"),
            part(1, "b"),
            part(2, "c").key("only.here", 0, &[1]),
        ];
        let files: Vec<_> = PARTS.into_iter().zip(&parts).collect();
        let w = open_among("split", &files, PARTS[1]).unwrap();
        assert_eq!(
            (w.files.len(), w.tensors.len(), w.total_bytes()),
            (3, 3, 96)
        );
        assert_eq!(w.tensors["c"].file, 2);
        assert_eq!(w.get_str("general.name").unwrap(), Some("tiny"));
        assert_eq!(w.metadata.get("only.here"), None);
        let numbers: Vec<f32> = (0..32_u8)
            .collect::<Vec<_>>()
            .as_chunks()
            .0
            .iter()
            .map(|b| f32::from_le_bytes(*b))
            .collect();
        assert_eq!(w.require("b").unwrap().dequantize(), numbers);
    }

    #[test]
    fn a_split_model_is_whole_and_in_order() {
        let refused = |test: &str, files: &[(&str, &Writer)], name: &str, words: &str| {
            let error = open_among(test, files, name).unwrap_err().to_string();
            assert!(error.contains(words), "{error}");
        };
        let [a, b, c] = &[part(0, "a"), part(1, "b"), part(2, "c")];
        let [p1, p2, p3] = PARTS;
        refused(
            "missing",
            &[(p1, a), (p3, c)],
            p1,
            "m-00002-of-00003.gguf: part 2 of 3: No such file",
        );
        refused(
            "order",
            &[(p1, a), (p2, c), (p3, b)],
            p1,
            "\"split.no\" should be 1 in a file of this name, got 2",
        );
        refused(
            "twice",
            &[(p1, a), (p2, &part(1, "a")), (p3, c)],
            p1,
            "tensor \"a\" is in an earlier part too",
        );
        refused(
            "renamed",
            &[("m.gguf", a)],
            "m.gguf",
            "\"split.count\" should be 1 in a file of this name, got 3",
        );
        refused(
            "foreign",
            &[(p1, a), (p2, &Writer::new()), (p3, c)],
            p1,
            "\"split.count\" should be 3",
        );
        let two = part(2, "c").tensor("d", &[1], 0, 32);
        refused(
            "count",
            &[(p1, a), (p2, b), (p3, &two)],
            p1,
            "says that the model has 3 tensors, its parts hold 4",
        );
    }

    #[test]
    fn a_model_merged_again_has_no_parts() {
        let merged = Writer::new()
            .key("split.no", 2, &[0, 0])
            .key("split.count", 2, &[0, 0]);
        assert_eq!(
            open_among("merged", &[("m.gguf", &merged)], "m.gguf")
                .unwrap()
                .tensors
                .len(),
            2
        );
    }
}
