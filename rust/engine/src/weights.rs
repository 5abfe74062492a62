//! A loaded model: metadata and named tensors in memory-mapped files. Says nothing of what they mean.

use std::collections::HashMap;
use std::ops::Range;

use hfcore_kernels::mmap::Mapped;
use hfcore_kernels::quant::{self, TensorType};
use hfcore_kernels::quantize::quantize;

use crate::error::{Error, Result};
use crate::quantised::{Part, Quantised};

/// One metadata value of a model file. Arrays are typed, so that a vocabulary stays compact.
#[derive(Debug, Clone, PartialEq)]
pub enum Value {
    Bool(bool),
    Int(i64),
    /// Only for what does not fit `Int`.
    UInt(u64),
    Float(f64),
    String(String),
    Bools(Vec<bool>),
    Ints(Vec<i64>),
    Floats(Vec<f32>),
    Strings(Vec<String>),
}

/// Where a tensor lies: which file, which bytes.
#[derive(Debug, Clone)]
pub struct TensorInfo {
    pub tensor_type: TensorType,
    /// Outermost first: a matrix is `[out, in]`.
    pub shape: Vec<usize>,
    pub file: usize,
    pub bytes: Range<usize>,
}

/// A borrowed tensor: type, shape (outermost first) and its blocks.
#[derive(Debug, Clone, Copy)]
pub struct Tensor<'a> {
    pub name: &'a str,
    pub tensor_type: TensorType,
    pub shape: &'a [usize],
    pub data: &'a [u8],
    /// What it is to be made of where it becomes resident; none: as it is.
    pub target: Option<Target>,
    /// Its blocks as `target` has them, where they were made before.
    pub ready: Option<Ready<'a>>,
    /// Its rows, over all outer dimensions together, unless it is a part.
    rows: usize,
    /// Of a part of a matrix, all its bytes and the part's first row.
    pub outer: Option<(&'a [u8], usize)>,
    /// The file that `data` lies in, and where.
    place: Option<(&'a Mapped, usize)>,
}

/// What a tensor is quantised to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Target {
    pub tensor_type: TensorType,
    /// The largest numbers of NF4's and FP4's blocks are quantised too: bitsandbytes' double quantisation.
    pub nested: bool,
}

/// Blocks that were made before, in a file of their own.
#[derive(Debug, Clone, Copy)]
pub struct Ready<'a> {
    file: &'a Mapped,
    start: usize,
    len: usize,
}

impl<'a> Ready<'a> {
    /// # Panics
    /// Where the file is shorter: a defect of the caller.
    pub fn new(file: &'a Mapped, bytes: Range<usize>) -> Self {
        assert!(bytes.end <= file.len(), "a range beyond its file");
        Self {
            file,
            start: bytes.start,
            len: bytes.len(),
        }
    }

    pub fn blocks(&self) -> &'a [u8] {
        &self.file[self.start..self.start + self.len]
    }

    /// See [`Tensor::forget`].
    pub fn forget(&self, bytes: Range<usize>) {
        let end = bytes.end.min(self.len);
        self.file.forget(self.start + bytes.start..self.start + end);
    }

    /// These of all `rows`.
    fn slice(&self, first: usize, count: usize, rows: usize) -> Self {
        let bytes = self.len.checked_div(rows).unwrap_or(0);
        Self {
            start: self.start + first * bytes,
            len: count * bytes,
            ..*self
        }
    }
}

fn rows_of(shape: &[usize]) -> usize {
    shape
        .split_last()
        .map_or(1, |(_, outer)| outer.iter().product())
}

/// The files of one model, mapped, with everything in them named.
pub struct Weights {
    /// What the errors call it: the path that was opened.
    pub path: String,
    pub files: Vec<Mapped>,
    pub tensors: HashMap<String, TensorInfo>,
    /// What is no tensor of floats: parts of a quantised checkpoint's matrices that stay apart.
    pub packed: HashMap<String, Part>,
    /// Matrices of a quantised checkpoint, by the names that they would have as tensors. Their parts are in no other map.
    pub quantised: HashMap<String, Quantised>,
    /// GGUF key-values; for a safetensors directory, empty.
    pub metadata: HashMap<String, Value>,
    /// `config.json` and `generation_config.json` of a safetensors directory.
    pub config: Option<serde_json::Value>,
    pub generation_config: Option<serde_json::Value>,
}

impl Weights {
    /// The tensor of this name, if there is one.
    pub fn tensor(&self, name: &str) -> Option<Tensor<'_>> {
        let (name, info) = self.tensors.get_key_value(name)?;
        let file = self.files.get(info.file)?;
        Some(Tensor {
            name,
            tensor_type: info.tensor_type,
            shape: &info.shape,
            target: None,
            ready: None,
            outer: None,
            rows: rows_of(&info.shape),
            data: file.get(info.bytes.clone())?,
            place: Some((file, info.bytes.start)),
        })
    }

    /// The shape and bytes of this name, if there are any.
    pub fn packed(&self, name: &str) -> Option<(&[usize], &[u8])> {
        let info = self.packed.get(name)?;
        let file = self.files.get(info.file)?;
        Some((&info.shape, file.get(info.bytes.clone())?))
    }

    /// The tensor of this name; without it, an [`Error::ModelFile`] that names the nearest one there is.
    pub fn require(&self, name: &str) -> Result<Tensor<'_>> {
        if let Some(quantised) = self.quantised.get(name) {
            return Err(Error::Unsupported {
                what: "quantised tensor",
                name: format!("{name} ({})", quantised.kind),
                supported: "matrices that activations are multiplied with".into(),
            });
        }
        let known = self.tensors.keys().chain(self.quantised.keys());
        self.tensor(name)
            .ok_or_else(|| self.missing("tensor", name, known))
    }

    /// Take out the metadata whose keys begin so: what is needed once, and large.
    pub fn take_metadata(&mut self, prefix: &str) -> HashMap<String, Value> {
        self.metadata
            .extract_if(|key, _| key.starts_with(prefix))
            .collect()
    }

    /// Bytes that tensors of types which are read only will take beyond those in the file.
    pub fn growth(&self) -> u64 {
        let grown = self.tensors.values().map(|t| {
            let wanted = t.tensor_type.resident().row_bytes(t.shape.iter().product());
            wanted.unwrap_or(0).saturating_sub(t.bytes.len()) as u64
        });
        grown.sum()
    }

    /// Bytes of all tensors.
    pub fn total_bytes(&self) -> u64 {
        let packed = self.packed.values().map(|t| t.bytes.len() as u64);
        let tensors = self.tensors.values().map(|t| t.bytes.len() as u64);
        let quantised = self.quantised.values().map(|t| t.bytes() as u64);
        tensors.chain(packed).chain(quantised).sum()
    }

    /// An [`Error::ModelFile`] about these files.
    pub fn problem(&self, problem: impl Into<String>) -> Error {
        Error::ModelFile {
            path: self.path.clone(),
            problem: problem.into(),
        }
    }

    /// The error for a metadata key that a model of this kind must have.
    pub fn missing_key(&self, key: &str) -> Error {
        self.missing("metadata", key, self.metadata.keys())
    }

    fn missing<'a>(
        &self,
        what: &str,
        name: &str,
        known: impl Iterator<Item = &'a String>,
    ) -> Error {
        let near = nearest(name, known)
            .map(|n| format!("; the nearest name is {n:?}"))
            .unwrap_or_default();
        self.problem(format!("has no {what} {name:?}{near}"))
    }
}

/// Typed metadata. Each getter is `Ok(None)` where the key is absent and an [`Error::ModelFile`] with the key, what was
/// wanted and what came where its value is of another kind.
impl Weights {
    /// A string.
    pub fn get_str(&self, key: &str) -> Result<Option<&str>> {
        self.get(key, "a string", |v| match v {
            Value::String(s) => Some(s.as_str()),
            _ => None,
        })
    }

    /// True or false.
    pub fn get_bool(&self, key: &str) -> Result<Option<bool>> {
        self.get(key, "true or false", |v| match v {
            Value::Bool(b) => Some(*b),
            _ => None,
        })
    }

    /// A whole number of 32 bits. A float is refused, whole or not.
    pub fn get_u32(&self, key: &str) -> Result<Option<u32>> {
        self.get(key, "a whole number from 0 to 4294967295", |v| match v {
            Value::Int(n) => u32::try_from(*n).ok(),
            _ => None,
        })
    }

    /// A size or count. A float is refused, whole or not.
    pub fn get_usize(&self, key: &str) -> Result<Option<usize>> {
        self.get(key, "a whole number, not negative", |v| match v {
            Value::Int(n) => usize::try_from(*n).ok(),
            Value::UInt(n) => usize::try_from(*n).ok(),
            _ => None,
        })
    }

    /// A finite number; a whole one is taken as well.
    pub fn get_f32(&self, key: &str) -> Result<Option<f32>> {
        let number = |v: &Value| match v {
            Value::Float(x) => Some(*x as f32),
            Value::Int(n) => Some(*n as f32),
            Value::UInt(n) => Some(*n as f32),
            _ => None,
        };
        self.get(key, "a finite number", |v| {
            number(v).filter(|x| x.is_finite())
        })
    }

    /// An array of strings. Like the other arrays it may be empty; an empty array is of every kind.
    pub fn get_strings(&self, key: &str) -> Result<Option<&[String]>> {
        self.get(key, "an array of strings", |v| match v {
            Value::Strings(a) => Some(a.as_slice()),
            v => v.is_empty_array().then_some(&[][..]),
        })
    }

    /// An array of whole numbers.
    pub fn get_ints(&self, key: &str) -> Result<Option<&[i64]>> {
        self.get(key, "an array of whole numbers", |v| match v {
            Value::Ints(a) => Some(a.as_slice()),
            v => v.is_empty_array().then_some(&[][..]),
        })
    }

    /// An array of floats, which may hold infinities and NaN: a token's score may be one.
    pub fn get_floats(&self, key: &str) -> Result<Option<&[f32]>> {
        self.get(key, "an array of floats", |v| match v {
            Value::Floats(a) => Some(a.as_slice()),
            v => v.is_empty_array().then_some(&[][..]),
        })
    }

    /// An array of true and false.
    pub fn get_bools(&self, key: &str) -> Result<Option<&[bool]>> {
        self.get(key, "an array of true and false", |v| match v {
            Value::Bools(a) => Some(a.as_slice()),
            v => v.is_empty_array().then_some(&[][..]),
        })
    }

    fn get<'a, T>(
        &'a self,
        key: &str,
        wanted: &str,
        take: impl Fn(&'a Value) -> Option<T>,
    ) -> Result<Option<T>> {
        let Some(value) = self.metadata.get(key) else {
            return Ok(None);
        };
        let wrong = || {
            self.problem(format!(
                "metadata {key:?} should be {wanted}, got {}",
                value.describe()
            ))
        };
        take(value).map(Some).ok_or_else(wrong)
    }
}

impl Value {
    /// For an error message: the kind and, of a scalar, the (shortened) value.
    pub fn describe(&self) -> String {
        match self {
            Value::Bool(b) => b.to_string(),
            Value::Int(n) => n.to_string(),
            Value::UInt(n) => n.to_string(),
            Value::Float(x) => format!("the float {x:?}"),
            Value::String(s) if s.chars().nth(60).is_some() => {
                format!("the string {:?}...", s.chars().take(60).collect::<String>())
            }
            Value::String(s) => format!("the string {s:?}"),
            Value::Bools(a) => format!("an array of {} true and false", a.len()),
            Value::Ints(a) => format!("an array of {} whole numbers", a.len()),
            Value::Floats(a) => format!("an array of {} floats", a.len()),
            Value::Strings(a) => format!("an array of {} strings", a.len()),
        }
    }

    fn is_empty_array(&self) -> bool {
        match self {
            Value::Bools(a) => a.is_empty(),
            Value::Ints(a) => a.is_empty(),
            Value::Floats(a) => a.is_empty(),
            Value::Strings(a) => a.is_empty(),
            _ => false,
        }
    }
}

impl<'a> Tensor<'a> {
    /// A matrix in memory, for what is not stored as it is used.
    pub fn of(tensor_type: TensorType, shape: &'a [usize], data: &'a [u8]) -> Self {
        Self {
            name: "",
            tensor_type,
            shape,
            data,
            target: None,
            ready: None,
            outer: None,
            rows: rows_of(shape),
            place: None,
        }
    }

    /// The same under another name.
    pub fn named(self, name: &'a str) -> Self {
        Self { name, ..self }
    }

    /// The same, to be quantised so.
    pub fn aimed(self, target: Option<Target>) -> Self {
        Self { target, ..self }
    }

    /// The same, whose blocks were made before, perhaps.
    pub fn readied(self, ready: Option<Ready<'a>>) -> Self {
        Self { ready, ..self }
    }

    /// `count` of its rows, from `first` on.
    ///
    /// # Panics
    /// Where there are fewer: a defect of the caller.
    pub fn slice(&self, first: usize, count: usize) -> Self {
        let bytes = self.data.len().checked_div(self.rows).unwrap_or(0);
        let (whole, before) = self.outer.unwrap_or((self.data, 0));
        Self {
            data: &self.data[first * bytes..(first + count) * bytes],
            rows: count,
            ready: self.ready.map(|r| r.slice(first, count, self.rows)),
            outer: (self.shape.len() == 2).then_some((whole, before + first)),
            place: self
                .place
                .map(|(file, start)| (file, start + first * bytes)),
            ..*self
        }
    }

    /// All its numbers.
    pub fn elements(&self) -> usize {
        self.rows * self.cols()
    }

    /// Numbers in a row: the innermost dimension; 1 for a scalar.
    pub fn cols(&self) -> usize {
        self.shape.last().copied().unwrap_or(1)
    }

    /// Rows, over all outer dimensions together: experts `[e, out, in]` have `e * out`. A vector is one row.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// The first half of its rows and the second, of an even number of rows.
    pub fn halves(&self) -> [Self; 2] {
        let rows = self.rows / 2;
        [self.slice(0, rows), self.slice(rows, rows)]
    }

    /// The blocks of row `i`.
    ///
    /// # Panics
    /// Where there is no such row: a defect of the caller.
    pub fn row(&self, i: usize) -> &'a [u8] {
        // The readers made sure that rows are whole blocks, so this division is exact.
        let bytes = self.data.len() / self.rows();
        &self.data[i * bytes..(i + 1) * bytes]
    }

    /// Say that these bytes of `data` will not be read soon, so that they need not stay in memory. Whoever reads them
    /// all the same waits for the file.
    pub fn forget(&self, bytes: Range<usize>) {
        if let Some((file, at)) = self.place {
            file.forget(at + bytes.start..at + bytes.end.min(self.data.len()));
        }
    }

    /// Every number, row after row.
    pub fn dequantize(&self) -> Vec<f32> {
        let mut out = vec![0.0; self.elements()];
        quant::dequantize(self.tensor_type, self.data, &mut out);
        out
    }

    /// Row `i` into `out`, which must hold `cols` numbers.
    ///
    /// # Panics
    /// Where there is no such row, or `out` is of another length: a defect of the caller.
    pub fn dequantize_row(&self, i: usize, out: &mut [f32]) {
        quant::dequantize(self.tensor_type, self.row(i), out);
    }
}

impl std::fmt::Debug for Weights {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "Weights({:?}, {} tensors, {} metadata)",
            self.path,
            self.tensors.len(),
            self.metadata.len()
        )
    }
}

/// The numbers of `count` blocks of the GGUF type `type_name`, and how many numbers a block has.
///
/// # Errors
/// [`Error::Unsupported`] for an unknown type, [`Error::InvalidRequest`] for bytes of another number.
pub fn dequantize_blocks(
    type_name: &str,
    count: usize,
    blocks: &[u8],
) -> Result<(Vec<f32>, usize)> {
    let tensor_type = tensor_type(type_name)?;
    let wanted = tensor_type.block_bytes();
    if count.checked_mul(wanted) != Some(blocks.len()) {
        return Err(Error::InvalidRequest(format!(
            "a block of {type_name} has {wanted} bytes, got {} for {count}",
            blocks.len()
        )));
    }
    let mut out = vec![0.0; count * tensor_type.block_len()];
    quant::dequantize(tensor_type, blocks, &mut out);
    Ok((out, tensor_type.block_len()))
}

fn tensor_type(name: &str) -> Result<TensorType> {
    let all = [&TensorType::ALL[..], &TensorType::READ_ONLY].concat();
    TensorType::from_name(name).ok_or_else(|| unknown_type(name, &all))
}

fn unknown_type(name: &str, known: &[TensorType]) -> Error {
    let supported: Vec<_> = known.iter().map(|t| t.name()).collect();
    Error::Unsupported {
        what: "tensor type",
        name: name.to_owned(),
        supported: supported.join(", "),
    }
}

/// `rows` rows of numbers as blocks of a type; see [`hfcore_kernels::quantize`].
///
/// # Errors
/// [`Error::Unsupported`] for an unknown type, [`Error::InvalidRequest`] for rows that are no whole blocks.
pub fn quantize_rows(
    type_name: &str,
    rows: usize,
    numbers: &[f32],
    importance: Option<&[f32]>,
) -> Result<Vec<u8>> {
    let tensor_type = tensor_type(type_name)?;
    if tensor_type.resident() != tensor_type {
        return Err(unknown_type(type_name, &TensorType::ALL));
    }
    let cols = numbers.len() / rows.max(1);
    let row_bytes = tensor_type.row_bytes(cols).ok_or_else(|| {
        Error::InvalidRequest(format!(
            "rows of {type_name} are multiples of {} numbers, got {cols}",
            tensor_type.block_len()
        ))
    })?;
    if importance.is_some_and(|w| w.len() != numbers.len()) {
        let problem = "importance must have the shape of the numbers";
        return Err(Error::InvalidRequest(problem.into()));
    }
    let mut out = vec![0; rows * row_bytes];
    quantize(tensor_type, numbers, importance, &mut out);
    Ok(out)
}

/// The known name with the fewest edits from `name`, if they are less than half of it.
pub(crate) fn nearest<'a>(name: &str, known: impl Iterator<Item = &'a String>) -> Option<&'a str> {
    // Bounded, since a hostile file may have a million long names.
    let close = known
        .filter(|k| k.len().abs_diff(name.len()) * 2 < name.len())
        .take(10_000);
    let near = close
        .map(|k| (edits(name.as_bytes(), k.as_bytes()), k.as_str()))
        .min()?;
    (near.0 * 2 < name.len()).then_some(near.1)
}

/// Levenshtein distance.
fn edits(a: &[u8], b: &[u8]) -> usize {
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, x) in a.iter().enumerate() {
        let mut diagonal = std::mem::replace(&mut row[0], i + 1);
        for (j, y) in b.iter().enumerate() {
            let best = (diagonal + usize::from(x != y))
                .min(row[j] + 1)
                .min(row[j + 1] + 1);
            diagonal = std::mem::replace(&mut row[j + 1], best);
        }
    }
    row[b.len()]
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weights(metadata: &[(&str, Value)]) -> Weights {
        let tensors = [
            "blk.0.attn_q.weight",
            "blk.1.attn_q.weight",
            "output.weight",
        ]
        .map(|name| {
            let info = TensorInfo {
                tensor_type: TensorType::F32,
                shape: vec![1],
                file: 0,
                bytes: 0..4,
            };
            (name.to_string(), info)
        });
        Weights {
            path: "m.gguf".into(),
            files: vec![],
            tensors: tensors.into(),
            packed: HashMap::new(),
            quantised: HashMap::new(),
            metadata: metadata
                .iter()
                .map(|(k, v)| (k.to_string(), v.clone()))
                .collect(),
            config: None,
            generation_config: None,
        }
    }

    #[test]
    fn weights_may_cross_threads() {
        fn crosses<T: Send + Sync>() {}
        crosses::<Weights>();
    }

    #[test]
    fn a_missing_name_gets_the_nearest_known_one() {
        let w = weights(&[("llama.block_count", Value::Int(2))]);
        let error = w.require("blk.1.attn_k.weight").unwrap_err().to_string();
        assert_eq!(
            error,
            "m.gguf: has no tensor \"blk.1.attn_k.weight\"; the nearest name is \"blk.1.attn_q.weight\""
        );
        assert_eq!(
            w.require("zzz").unwrap_err().to_string(),
            "m.gguf: has no tensor \"zzz\""
        );
        assert!(
            w.missing_key("llama.block_cont")
                .to_string()
                .ends_with("the nearest name is \"llama.block_count\"")
        );
    }

    #[test]
    fn a_getter_takes_its_own_kind_and_names_every_other() {
        let w = weights(&[
            ("s", Value::String("x".into())),
            ("n", Value::Int(7)),
            ("minus", Value::Int(-1)),
            ("big", Value::UInt(u64::MAX)),
            ("x", Value::Float(0.5)),
            ("nan", Value::Float(f64::NAN)),
            ("huge", Value::Float(1e300)),
            ("b", Value::Bool(true)),
            ("strings", Value::Strings(vec!["a".into()])),
            ("empty", Value::Ints(vec![])),
        ]);
        assert_eq!(w.get_str("s").unwrap(), Some("x"));
        assert_eq!(w.get_str("absent").unwrap(), None);
        assert_eq!(w.get_u32("n").unwrap(), Some(7));
        assert_eq!(w.get_usize("big").unwrap(), Some(usize::MAX));
        assert_eq!(w.get_f32("x").unwrap(), Some(0.5));
        assert_eq!(w.get_f32("n").unwrap(), Some(7.0));
        assert_eq!(w.get_bool("b").unwrap(), Some(true));
        assert_eq!(
            w.get_strings("strings").unwrap(),
            Some(&["a".to_string()][..])
        );
        assert_eq!(w.get_strings("empty").unwrap(), Some(&[][..]));
        let says =
            |error: Error, words: &str| assert!(error.to_string().contains(words), "{error}");
        says(
            w.get_u32("minus").unwrap_err(),
            "metadata \"minus\" should be a whole number from 0 to 4294967295, got -1",
        );
        says(w.get_u32("big").unwrap_err(), "got 18446744073709551615");
        says(
            w.get_usize("nan").unwrap_err(),
            "should be a whole number, not negative, got the float NaN",
        );
        says(w.get_usize("x").unwrap_err(), "got the float 0.5");
        says(
            w.get_f32("nan").unwrap_err(),
            "should be a finite number, got the float NaN",
        );
        says(w.get_f32("huge").unwrap_err(), "got the float 1e300");
        says(
            w.get_bool("n").unwrap_err(),
            "should be true or false, got 7",
        );
        says(
            w.get_ints("strings").unwrap_err(),
            "an array of whole numbers, got an array of 1 strings",
        );
        says(
            w.get_floats("s").unwrap_err(),
            "an array of floats, got the string \"x\"",
        );
        says(
            w.get_bools("n").unwrap_err(),
            "an array of true and false, got 7",
        );
        says(w.get_str("n").unwrap_err(), "should be a string, got 7");
    }

    #[test]
    fn a_row_is_the_innermost_dimension() {
        let data: Vec<u8> = (0..12).flat_map(|i| (i as f32).to_le_bytes()).collect();
        let t = Tensor {
            name: "t",
            tensor_type: TensorType::F32,
            shape: &[2, 3, 2],
            target: None,
            ready: None,
            outer: None,
            rows: rows_of(&[2, 3, 2]),
            data: &data,
            place: None,
        };
        assert_eq!((t.rows(), t.cols(), t.elements()), (6, 2, 12));
        let mut row = [0.0; 2];
        t.dequantize_row(4, &mut row);
        assert_eq!(row, [8.0, 9.0]);
        assert_eq!(t.dequantize()[11], 11.0);
        assert_eq!(t.row(5), &data[40..]);
        assert_eq!(t.slice(1, 3).row(2), t.row(3));
        let [_, second] = t.halves();
        assert_eq!((second.rows(), second.elements()), (3, 6));
        assert_eq!(second.row(1), t.row(4));
        let scalar = Tensor {
            shape: &[],
            rows: rows_of(&[]),
            data: &data[..4],
            ..t
        };
        assert_eq!((scalar.rows(), scalar.cols(), scalar.elements()), (1, 1, 1));
        let vector = Tensor {
            shape: &[12],
            rows: rows_of(&[12]),
            ..t
        };
        assert_eq!((vector.rows(), vector.cols()), (1, 12));
    }

    #[test]
    fn a_long_string_is_shortened_in_a_message() {
        assert!(Value::String("é".repeat(100_000)).describe().len() < 200);
    }
}
