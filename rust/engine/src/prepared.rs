//! Matrices that were quantised as they were loaded, in a file, so that the next load need not. Knows no decoder.
//!
//! Format: `HFCOREQT`, the length of a JSON header as u32, the header, zeros up to a multiple of 64, then the tensors' blocks in
//! the header's order. Little endian.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::ops::Range;
use std::path::Path;

use hfcore_kernels::mmap::Mapped;
use hfcore_kernels::pool::Pool;
use hfcore_kernels::quant::TensorType;
use serde::{Deserialize, Serialize};

use crate::conversion::Conversion;
use crate::error::{Error, Result};
use crate::weights::{Ready, Target, Weights};

const MAGIC: &[u8; 8] = b"HFCOREQT";
/// Of blocks as this version makes them: a better quantiser is another version.
const VERSION: u32 = 1;
const MAX_HEADER: usize = 64 << 20;
const ALIGNMENT: usize = 64;

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u32,
    /// Whose tensors they are, and what was wished of them.
    key: String,
    tensors: Vec<Entry>,
}

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Entry {
    name: String,
    tensor_type: String,
    nested: bool,
    bytes: usize,
}

/// Tensors' blocks, by their checkpoint's names.
pub struct Prepared {
    file: Mapped,
    tensors: HashMap<String, (Target, Range<usize>)>,
}

impl Prepared {
    /// Those of the file at `path`, whose name is the key of what they are; if it has none of this key, make it first, of
    /// the tensors in `wanted`. `progress(done, total)` is told in bytes of the source; false stops it with `Closed`.
    ///
    /// # Errors
    /// [`Error::ModelFile`] where the file cannot be written; [`Error::Closed`].
    pub fn open_or_make(
        path: &Path,
        weights: &Weights,
        wanted: &[(&str, Target)],
        threads: Option<usize>,
        progress: &dyn Fn(u64, u64) -> bool,
    ) -> Result<Self> {
        let key = path.file_stem().unwrap_or_default().to_string_lossy();
        if let Ok(found) = Self::read(path, &key) {
            return Ok(found);
        }
        let part = path.with_file_name(format!(".{key}.{}.part", std::process::id()));
        let made = make(&part, &key, weights, wanted, threads, progress);
        let made = made.and_then(|()| std::fs::rename(&part, path).map_err(|e| problem(path, e)));
        if made.is_err() {
            let _ = std::fs::remove_file(&part);
        }
        made?;
        Self::read(path, &key).map_err(|e| problem(path, e))
    }

    fn read(path: &Path, key: &str) -> std::result::Result<Self, String> {
        let file = Mapped::open(path).map_err(|e| e.to_string())?;
        let tensors = parse(&file, key)?;
        Ok(Self { file, tensors })
    }

    /// The blocks of a tensor, as `target` has them, if they take `bytes`.
    pub fn tensor(&self, name: &str, target: Target, bytes: usize) -> Option<Ready<'_>> {
        let (made, range) = self.tensors.get(name)?;
        let fits = *made == target && range.len() == bytes;
        fits.then(|| Ready::new(&self.file, range.clone()))
    }
}

fn problem(path: &Path, problem: impl ToString) -> Error {
    Error::ModelFile {
        path: path.display().to_string(),
        problem: problem.to_string(),
    }
}

fn parse(
    bytes: &[u8],
    key: &str,
) -> std::result::Result<HashMap<String, (Target, Range<usize>)>, String> {
    let rest = bytes.strip_prefix(MAGIC).ok_or("no prepared tensors")?;
    let cut_short = || format!("cut short: it has {} bytes", bytes.len());
    let (length, rest) = rest.split_first_chunk().ok_or_else(cut_short)?;
    let length = u32::from_le_bytes(*length) as usize;
    if length > MAX_HEADER {
        return Err(format!("its header would have {length} bytes"));
    }
    let (header, _) = rest.split_at_checked(length).ok_or_else(cut_short)?;
    let header: Header = serde_json::from_slice(header).map_err(|e| e.to_string())?;
    if (header.version, &*header.key) != (VERSION, key) {
        return Err("another version's, or another model's".into());
    }
    let mut at = (MAGIC.len() + 4 + length).next_multiple_of(ALIGNMENT);
    let mut tensors = HashMap::new();
    for entry in header.tensors {
        let known = TensorType::ALL
            .iter()
            .find(|t| t.name() == entry.tensor_type);
        let tensor_type = *known.ok_or("a type of tensors that is not known")?;
        let end = at
            .checked_add(entry.bytes)
            .filter(|end| *end <= bytes.len());
        let end = end.ok_or_else(cut_short)?;
        let target = Target {
            tensor_type,
            nested: entry.nested,
        };
        tensors.insert(entry.name, (target, at..end));
        at = end;
    }
    match at == bytes.len() {
        true => Ok(tensors),
        false => Err("longer than its tensors".into()),
    }
}

fn make(
    path: &Path,
    key: &str,
    weights: &Weights,
    wanted: &[(&str, Target)],
    threads: Option<usize>,
    progress: &dyn Fn(u64, u64) -> bool,
) -> Result<()> {
    let pool = Pool::new(threads.unwrap_or_else(Pool::available));
    let mut tensors = Vec::with_capacity(wanted.len());
    let mut total = 0;
    for (name, target) in wanted {
        let tensor = weights.require(name)?;
        let row = target.tensor_type.row_bytes(tensor.cols()).unwrap_or(0);
        total += tensor.data.len() as u64;
        tensors.push(Entry {
            name: (*name).to_owned(),
            tensor_type: target.tensor_type.name().to_owned(),
            nested: target.nested,
            bytes: tensor.rows() * row,
        });
    }
    let header = Header {
        version: VERSION,
        key: key.to_owned(),
        tensors,
    };
    let mut out = begin(path, &header).map_err(|e| problem(path, e))?;
    let mut done = 0;
    for (name, target) in wanted {
        let tensor = weights.require(name)?;
        let blocks = Conversion::new(&pool, tensor, *target)?.blocks(&pool, |_| None);
        out.write_all(&blocks).map_err(|e| problem(path, e))?;
        tensor.forget(0..tensor.data.len());
        done += tensor.data.len() as u64;
        if !progress(done, total) {
            return Err(Error::Closed);
        }
    }
    out.flush().map_err(|e| problem(path, e))
}

fn begin(path: &Path, header: &Header) -> io::Result<BufWriter<File>> {
    let header = serde_json::to_vec(header)?;
    let mut out = BufWriter::new(File::create(path)?);
    out.write_all(MAGIC)?;
    out.write_all(&(header.len() as u32).to_le_bytes())?;
    out.write_all(&header)?;
    let at = MAGIC.len() + 4 + header.len();
    out.write_all(&[0; ALIGNMENT][..at.next_multiple_of(ALIGNMENT) - at])?;
    Ok(out)
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, blocks: &[u8]) -> Vec<u8> {
        let mut bytes = MAGIC.to_vec();
        bytes.extend((header.len() as u32).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.resize(bytes.len().next_multiple_of(ALIGNMENT), 0);
        bytes.extend(blocks);
        bytes
    }

    fn header(key: &str, bytes: u64) -> String {
        let entry =
            format!(r#"{{"name":"w","tensor_type":"Q8_0","nested":false,"bytes":{bytes}}}"#);
        format!(r#"{{"version":{VERSION},"key":"{key}","tensors":[{entry}]}}"#)
    }

    #[test]
    fn a_file_is_taken_whole_and_of_its_key_alone() {
        let whole = file(&header("k", 34), &[1; 34]);
        let found = parse(&whole, "k").unwrap();
        let target = Target {
            tensor_type: TensorType::Q8_0,
            nested: false,
        };
        assert_eq!(found["w"].0, target);
        assert_eq!(whole[found["w"].1.clone()], [1; 34]);
        assert!(parse(&whole, "other").is_err());
        for end in 0..whole.len() {
            assert!(parse(&whole[..end], "k").is_err(), "{end}");
        }
        assert!(parse(&file(&header("k", 33), &[1; 34]), "k").is_err());
        assert!(parse(&file(&header("k", u64::MAX), &[1; 34]), "k").is_err());
        let unknown = header("k", 34).replace("Q8_0", "Q9_9");
        assert!(parse(&file(&unknown, &[1; 34]), "k").is_err());
    }
}
