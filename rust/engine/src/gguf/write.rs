//! Metadata and tensors into a GGUF file.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::Path;

use super::parse;
use crate::error::{Error, Result};
use crate::weights::{Value, Weights};
use hfcore_kernels::quant::TensorType;

/// What other files begin data at.
const ALIGNMENT: usize = 32;

/// Keys that say how a file's tensors are stored, and into how many files.
const OWN_KEYS: [&str; 3] = [
    "general.file_type",
    "general.quantization_version",
    "general.alignment",
];

/// A tensor that is about to be written.
pub struct Planned<'a> {
    pub name: &'a str,
    pub tensor_type: TensorType,
    /// Outermost first.
    pub shape: &'a [usize],
    pub bytes: usize,
}

/// A file under way: its header is written, its tensors are to follow in the order in which they were planned.
pub struct Writer {
    out: BufWriter<File>,
    path: String,
    at: usize,
}

impl Writer {
    /// Begin a file with this metadata: see [`copied`] and [`entry`].
    ///
    /// # Errors
    /// [`Error::ModelFile`] where the file cannot be written; [`Error::Unsupported`] for a type that no GGUF file has.
    pub fn begin(path: &Path, metadata: &[Vec<u8>], tensors: &[Planned]) -> Result<Self> {
        let mut header = Vec::new();
        header.extend(b"GGUF");
        header.extend(3u32.to_le_bytes());
        header.extend((tensors.len() as u64).to_le_bytes());
        header.extend((metadata.len() as u64).to_le_bytes());
        header.extend(metadata.concat());
        let mut offset = 0;
        for tensor in tensors {
            put_string(&mut header, tensor.name);
            header.extend((tensor.shape.len() as u32).to_le_bytes());
            for n in tensor.shape.iter().rev() {
                header.extend((*n as u64).to_le_bytes());
            }
            let id = tensor.tensor_type.id().ok_or_else(|| Error::Unsupported {
                what: "tensor type of a GGUF file",
                name: tensor.tensor_type.name().into(),
                supported: TensorType::GGUF.map(TensorType::name).join(", "),
            })?;
            header.extend(id.to_le_bytes());
            header.extend((offset as u64).to_le_bytes());
            offset += tensor.bytes.next_multiple_of(ALIGNMENT);
        }
        let name = path.display().to_string();
        let file = File::create(path).map_err(|e| Error::ModelFile {
            path: name.clone(),
            problem: e.to_string(),
        })?;
        let mut writer = Self {
            out: BufWriter::new(file),
            path: name,
            at: 0,
        };
        writer.tensor(&header)?;
        Ok(writer)
    }

    /// The next tensor's bytes.
    ///
    /// # Errors
    /// [`Error::ModelFile`] where they cannot be written.
    pub fn tensor(&mut self, bytes: &[u8]) -> Result<()> {
        let padding = bytes.len().next_multiple_of(ALIGNMENT) - bytes.len();
        self.at += bytes.len() + padding;
        let written = self.out.write_all(bytes);
        let written = written.and_then(|()| self.out.write_all(&[0; ALIGNMENT][..padding]));
        written.map_err(|e| self.problem(e))
    }

    /// All were written; the file's length.
    ///
    /// # Errors
    /// As [`Self::tensor`].
    pub fn end(mut self) -> Result<usize> {
        self.out.flush().map_err(|e| self.problem(e))?;
        Ok(self.at)
    }

    fn problem(&self, error: std::io::Error) -> Error {
        Error::ModelFile {
            path: self.path.clone(),
            problem: error.to_string(),
        }
    }
}

/// The entries of the GGUF file `source` as they stand there, but for those that a file has of its own.
///
/// # Errors
/// [`Error::ModelFile`] for a damaged file.
pub fn copied(source: &Weights) -> Result<Vec<Vec<u8>>> {
    let Some(first) = source.files.first() else {
        return Err(source.problem("has no file"));
    };
    let contents = parse(first, &source.path)?;
    let kept = |key: &str| !OWN_KEYS.contains(&key) && !key.starts_with("split.");
    Ok(contents
        .entries
        .into_iter()
        .filter(|(key, _)| kept(key))
        .map(|(_, bytes)| first[bytes].to_vec())
        .collect())
}

/// What says how this file's tensors are stored.
pub fn own_entries(file_type: u32) -> [Vec<u8>; 2] {
    [(OWN_KEYS[0], file_type), (OWN_KEYS[1], 2)]
        .map(|(key, n)| entry(key, &Value::Int(i64::from(n))))
}

/// A key and its value. Whole numbers are unsigned ones of 32 bits, as sizes and ids are there; in arrays they are signed.
pub fn entry(key: &str, value: &Value) -> Vec<u8> {
    const U32: u32 = 4;
    const I32: u32 = 5;
    const F32: u32 = 6;
    const BOOL: u32 = 7;
    const STRING: u32 = 8;
    const ARRAY: u32 = 9;
    let mut out = Vec::new();
    put_string(&mut out, key);
    let kind = |out: &mut Vec<u8>, kind: u32| out.extend(kind.to_le_bytes());
    let array = |out: &mut Vec<u8>, of: u32, len: usize| {
        kind(out, ARRAY);
        kind(out, of);
        out.extend((len as u64).to_le_bytes());
    };
    match value {
        Value::Int(n) => {
            kind(&mut out, U32);
            out.extend((*n as u32).to_le_bytes());
        }
        Value::UInt(n) => {
            kind(&mut out, U32);
            out.extend((*n as u32).to_le_bytes());
        }
        Value::Float(x) => {
            kind(&mut out, F32);
            out.extend((*x as f32).to_le_bytes());
        }
        Value::Bool(b) => {
            kind(&mut out, BOOL);
            out.push(u8::from(*b));
        }
        Value::String(s) => {
            kind(&mut out, STRING);
            put_string(&mut out, s);
        }
        Value::Bools(all) => {
            array(&mut out, BOOL, all.len());
            out.extend(all.iter().map(|b| u8::from(*b)));
        }
        Value::Ints(all) => {
            array(&mut out, I32, all.len());
            out.extend(all.iter().flat_map(|n| (*n as i32).to_le_bytes()));
        }
        Value::Floats(all) => {
            array(&mut out, F32, all.len());
            out.extend(all.iter().flat_map(|x| x.to_le_bytes()));
        }
        Value::Strings(all) => {
            array(&mut out, STRING, all.len());
            all.iter().for_each(|s| put_string(&mut out, s));
        }
    }
    out
}

fn put_string(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend(text.as_bytes());
}
