//! What a cache holds of texts that have run, as a file: pages of keys and values, and the tokens they stand for. Knows no
//! engine.
//!
//! Format: `HFCOREKV`, the length of a JSON header as u32, the header, then for each page the number of the one before it
//! (its place in the file, or one of two beginnings) and its tokens as u32, then the pages' bytes. Little endian.

use std::fs::File;
use std::io::{self, BufWriter, Write};
use std::path::Path;

use hfcore_kernels::mmap::Mapped;
use serde::{Deserialize, Serialize};

use crate::batch::PAGE;
use crate::error::{Error, Result};

const MAGIC: &[u8; 8] = b"HFCOREKV";
/// Of pages as this version lays them out.
const VERSION: u32 = 1;
const MAX_HEADER: usize = 64 << 10;
/// What stands before a text's first page, of plain positions and of long ones (see `Span::long`).
const BEGINNINGS: [u32; 2] = [u32::MAX, u32::MAX - 1];
const RECORD: usize = 4 * (1 + PAGE);

#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct Header {
    version: u32,
    /// Whose keys and values they are.
    model: String,
    /// Positions and bytes of a page.
    page: usize,
    page_bytes: usize,
    pages: usize,
}

/// What stands before a page.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Before {
    Nothing {
        long: bool,
    },
    /// The page at this place in the list.
    Page(usize),
}

/// A page of a text.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SavedPage {
    pub before: Before,
    pub tokens: [u32; PAGE],
}

/// Pages, each after the one before it, and their bytes `[pages, page_bytes]`.
pub struct Saved<B> {
    pub pages: Vec<SavedPage>,
    pub page_bytes: usize,
    pub bytes: B,
}

impl Saved<Vec<u8>> {
    /// Write the file, whole or not at all.
    ///
    /// # Errors
    /// `ModelFile` where it cannot be written.
    pub fn write(&self, path: &Path, model: &str) -> Result<()> {
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        let part = path.with_file_name(format!(".{name}.{}.part", std::process::id()));
        let written = self
            .write_to(&part, model)
            .and_then(|()| std::fs::rename(&part, path));
        written.map_err(|e| {
            let _ = std::fs::remove_file(&part);
            file_error(path, e.to_string())
        })
    }

    fn write_to(&self, path: &Path, model: &str) -> io::Result<()> {
        let header = serde_json::to_vec(&Header {
            version: VERSION,
            model: model.to_string(),
            page: PAGE,
            page_bytes: self.page_bytes,
            pages: self.pages.len(),
        })?;
        let mut out = BufWriter::new(File::create(path)?);
        out.write_all(MAGIC)?;
        out.write_all(&(header.len() as u32).to_le_bytes())?;
        out.write_all(&header)?;
        for page in &self.pages {
            let before = match page.before {
                Before::Nothing { long } => BEGINNINGS[usize::from(long)],
                Before::Page(at) => at as u32,
            };
            for number in std::iter::once(&before).chain(&page.tokens) {
                out.write_all(&number.to_le_bytes())?;
            }
        }
        out.write_all(&self.bytes)?;
        out.flush()
    }
}

impl Saved<Mapped> {
    /// Read a file of the model `model` whose cache has pages of `page_bytes`.
    ///
    /// # Errors
    /// `ModelFile` where it is none, is cut short, or is another model's.
    pub fn read(path: &Path, model: &str, page_bytes: usize) -> Result<Self> {
        let bytes = Mapped::open(path).map_err(|e| file_error(path, e.to_string()))?;
        let pages = parse(&bytes, model, page_bytes).map_err(|e| file_error(path, e))?;
        Ok(Self {
            pages,
            page_bytes,
            bytes,
        })
    }

    /// The bytes of a page.
    pub fn page(&self, at: usize) -> &[u8] {
        let start = self.bytes.len() - (self.pages.len() - at) * self.page_bytes;
        &self.bytes[start..start + self.page_bytes]
    }
}

fn file_error(path: &Path, problem: String) -> Error {
    let path = path.display().to_string();
    Error::ModelFile { path, problem }
}

fn parse(
    bytes: &[u8],
    model: &str,
    page_bytes: usize,
) -> std::result::Result<Vec<SavedPage>, String> {
    let rest = bytes
        .strip_prefix(MAGIC)
        .ok_or("no saved prefixes: it does not begin with HFCOREKV")?;
    let cut_short = || format!("cut short: it has {} bytes", bytes.len());
    let (length, rest) = rest.split_first_chunk().ok_or_else(cut_short)?;
    let length = u32::from_le_bytes(*length) as usize;
    if length > MAX_HEADER {
        let problem =
            format!("its header would have {length} bytes, at most {MAX_HEADER} are read");
        return Err(problem);
    }
    let (header, rest) = rest.split_at_checked(length).ok_or_else(cut_short)?;
    let header: Header =
        serde_json::from_slice(header).map_err(|e| format!("the header is wrong: {e}"))?;
    if header.model != model {
        return Err("saved from another model, or as another kv_cache_dtype".into());
    }
    let wanted = (VERSION, PAGE, page_bytes);
    let got = (header.version, header.page, header.page_bytes);
    if wanted != got {
        return Err(format!(
            "version, positions and bytes of a page must be {wanted:?}, they are {got:?}"
        ));
    }
    let size = header.pages.checked_mul(RECORD + page_bytes);
    if size != Some(rest.len()) {
        return Err(format!(
            "{} pages take {} bytes each, it has {} for them",
            header.pages,
            RECORD + page_bytes,
            rest.len()
        ));
    }
    let records = rest[..header.pages * RECORD].chunks_exact(RECORD);
    records
        .enumerate()
        .map(|(at, record)| parse_page(at, record))
        .collect()
}

fn parse_page(at: usize, record: &[u8]) -> std::result::Result<SavedPage, String> {
    let (numbers, _) = record.as_chunks::<4>();
    let mut numbers = numbers.iter().map(|n| u32::from_le_bytes(*n));
    let before = match numbers.next().unwrap_or(u32::MAX) {
        n if n == BEGINNINGS[0] => Before::Nothing { long: false },
        n if n == BEGINNINGS[1] => Before::Nothing { long: true },
        n if (n as usize) < at => Before::Page(n as usize),
        n => {
            return Err(format!(
                "page {at} stands after {n}, which is not before it"
            ));
        }
    };
    let mut tokens = [0; PAGE];
    tokens
        .iter_mut()
        .zip(numbers)
        .for_each(|(to, from)| *to = from);
    Ok(SavedPage { before, tokens })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn saved() -> Saved<Vec<u8>> {
        let page = |before, token| SavedPage {
            before,
            tokens: [token; PAGE],
        };
        Saved {
            pages: vec![
                page(Before::Nothing { long: false }, 1),
                page(Before::Page(0), 2),
                page(Before::Nothing { long: true }, 1),
                page(Before::Page(0), 3),
            ],
            page_bytes: 8,
            bytes: (0..32).collect(),
        }
    }

    fn file(name: &str) -> std::path::PathBuf {
        std::env::temp_dir().join(format!("hfcore-saved-{}-{name}", std::process::id()))
    }

    #[test]
    fn what_is_written_is_read_again() {
        let path = file("again");
        saved().write(&path, "me").unwrap();
        let read = Saved::read(&path, "me", 8).unwrap();
        assert_eq!(read.pages, saved().pages);
        assert_eq!(read.page(1), [8, 9, 10, 11, 12, 13, 14, 15]);
        assert_eq!(read.page(3)[7], 31);
        for (model, page_bytes) in [("you", 8), ("me", 16)] {
            assert!(Saved::read(&path, model, page_bytes).is_err());
        }
        std::fs::remove_file(path).unwrap();
    }

    #[test]
    fn a_spoilt_file_is_an_error() {
        let path = file("spoilt");
        saved().write(&path, "me").unwrap();
        let whole = std::fs::read(&path).unwrap();
        let refused = |bytes: &[u8]| parse(bytes, "me", 8).unwrap_err();
        for length in 0..whole.len() {
            refused(&whole[..length]);
        }
        let records = whole.len() - 32 - 4 * RECORD;
        for (at, before) in [(0, 0u32), (0, 1), (1, 1), (3, 4), (3, u32::MAX - 2)] {
            let mut spoilt = whole.clone();
            let place = records + at * RECORD;
            spoilt[place..place + 4].copy_from_slice(&before.to_le_bytes());
            assert!(refused(&spoilt).contains("not before it"));
        }
        let mut long = whole.clone();
        long[8..12].copy_from_slice(&u32::MAX.to_le_bytes());
        assert!(refused(&long).contains("at most"));
        // Whatever a byte says: an error or other tokens, never a panic.
        for at in 0..whole.len() - 32 {
            for bit in 0..8 {
                let mut spoilt = whole.clone();
                spoilt[at] ^= 1 << bit;
                let _ = parse(&spoilt, "me", 8);
            }
        }
        std::fs::remove_file(path).unwrap();
    }
}
