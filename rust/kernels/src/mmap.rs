//! A file in memory, read-only.

use std::fs::File;
use std::io;
use std::ops::Deref;
use std::path::Path;

/// A read-only memory map of a whole file.
pub struct Mapped(memmap2::Mmap);

impl Mapped {
    /// Map `path`, which must be a regular file. The map of an empty file is empty.
    pub fn open(path: &Path) -> io::Result<Self> {
        // Before opening: to open a named pipe would wait for a writer.
        if !std::fs::metadata(path)?.is_file() {
            return Err(io::Error::new(
                io::ErrorKind::InvalidInput,
                "not a regular file",
            ));
        }
        let file = File::open(path)?;
        // SAFETY: the map is read-only and private to this process. Another process that truncates the file
        // while it is mapped would fault us, as it would every program that maps models; documented in README.
        unsafe { memmap2::Mmap::map(&file) }.map(Self)
    }
}

impl Deref for Mapped {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}
