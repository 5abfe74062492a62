//! Memory from the system: a file, read-only, and large zeroed pieces that the weights are packed into.

use std::fs::File;
use std::io;
use std::ops::{Deref, DerefMut, Range};
use std::path::Path;
use std::sync::{Arc, Mutex, PoisonError};

use memmap2::{Mmap, MmapMut};

/// A read-only memory map of a whole file.
#[derive(Debug)]
pub struct Mapped(Mmap);

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
        unsafe { Mmap::map(&file) }.map(Self)
    }

    /// Say that `bytes` will not be read soon: they no longer count as this process's memory, and are read from the
    /// file again when they are needed. Does nothing for bytes outside the file, and where the system has no such call.
    pub fn forget(&self, bytes: Range<usize>) {
        if bytes.is_empty() || bytes.end > self.0.len() {
            return;
        }
        // SAFETY: pages of a read-only map of a file are dropped, the neighbours on the first and last page too; whoever
        // reads them gets the same bytes from the file. An error would mean that they stay, which is no harm.
        #[cfg(unix)]
        let _ = unsafe {
            use memmap2::UncheckedAdvice::DontNeed;
            self.0
                .unchecked_advise_range(DontNeed, bytes.start, bytes.len())
        };
    }
}

impl Deref for Mapped {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        &self.0
    }
}

/// Bytes of a piece of an [`Arena`]. Of a piece only what was written is resident, up to the end of the last huge page:
/// at most 2 MB of so much.
const PIECE: usize = 128 << 20;

/// A cache line: where [`Room`] begins and ends.
const LINE: usize = 64;

/// Zeroed memory, handed out in order from large pieces, so that the system can back it with huge pages: they take a
/// sixth of the time to get (98 MB: 6 ms, in 4 KB pages 35 ms), and fewer address translations to read.
pub struct Arena {
    piece: usize,
    current: Mutex<Option<Piece>>,
}

struct Piece {
    memory: Arc<Memory>,
    used: usize,
}

/// A part of an arena that belongs to its holder alone. The piece it lies in is given back with its last part.
pub struct Room {
    memory: Arc<Memory>,
    /// Begins and ends on a cache line.
    bytes: Range<usize>,
}

/// A mapping that is reached only through `Room`s, whose ranges are disjoint.
struct Memory {
    base: *mut u8,
    /// Owns what `base` points to.
    _map: MmapMut,
}

// SAFETY: nobody reads or writes through `Memory` itself, only through the disjoint ranges of `Room`s.
unsafe impl Send for Memory {}
// SAFETY: as above.
unsafe impl Sync for Memory {}

impl Default for Arena {
    /// For a model's many matrices.
    fn default() -> Self {
        Self::with_pieces(PIECE)
    }
}

impl Arena {
    /// Takes pieces of at least so many bytes from the system; with 0, each room is a piece of its own.
    pub fn with_pieces(bytes: usize) -> Self {
        Self {
            piece: bytes,
            current: Mutex::new(None),
        }
    }

    /// `len` zeroed bytes, from the start of a cache line on.
    ///
    /// # Errors
    /// When the system has no such memory.
    pub fn take(&self, len: usize) -> io::Result<Room> {
        let len = len
            .checked_next_multiple_of(LINE)
            .ok_or(io::ErrorKind::OutOfMemory)?;
        let mut current = self.current.lock().unwrap_or_else(PoisonError::into_inner);
        let mut piece = match current.take() {
            Some(piece) if len <= piece.left() => piece,
            _ => Piece::new(len.max(self.piece))?,
        };
        let bytes = piece.used..piece.used + len;
        piece.used = bytes.end;
        let memory = piece.memory.clone();
        *current = Some(piece);
        Ok(Room { memory, bytes })
    }
}

impl Piece {
    fn new(len: usize) -> io::Result<Self> {
        let mut map = MmapMut::map_anon(len)?;
        // Only a wish.
        #[cfg(target_os = "linux")]
        let _ = map.advise(memmap2::Advice::HugePage);
        let memory = Memory {
            base: map.as_mut_ptr(),
            _map: map,
        };
        Ok(Self {
            memory: Arc::new(memory),
            used: 0,
        })
    }

    fn left(&self) -> usize {
        self.memory._map.len() - self.used
    }
}

impl Deref for Room {
    type Target = [u8];
    fn deref(&self) -> &[u8] {
        // SAFETY: the range is inside the map, which `memory` keeps, and belongs to this room alone; the bytes are
        // initialised, since the system zeroed them.
        unsafe {
            std::slice::from_raw_parts(self.memory.base.add(self.bytes.start), self.bytes.len())
        }
    }
}

impl DerefMut for Room {
    fn deref_mut(&mut self) -> &mut [u8] {
        // SAFETY: as above, and `self` is borrowed mutably.
        unsafe {
            std::slice::from_raw_parts_mut(self.memory.base.add(self.bytes.start), self.bytes.len())
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(name: &str, bytes: &[u8]) -> std::path::PathBuf {
        let path = std::env::temp_dir().join(format!("hfcore-mmap-{}-{name}", std::process::id()));
        std::fs::write(&path, bytes).unwrap();
        path
    }

    #[test]
    fn forgotten_bytes_are_read_again() {
        let bytes: Vec<u8> = (0..300_001u32).map(|i| (i * 7 % 251) as u8).collect();
        let path = file("again", &bytes);
        let mapped = Mapped::open(&path).unwrap();
        assert_eq!(*mapped, bytes);
        for range in [0..bytes.len(), 5000..5001, 70_000..200_123, 9..9] {
            mapped.forget(range);
            assert_eq!(*mapped, bytes);
        }
        mapped.forget(bytes.len()..bytes.len() + 1);
        mapped.forget(0..usize::MAX);
        assert_eq!(*mapped, bytes);
        std::fs::remove_file(&path).unwrap();
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn forgotten_bytes_are_no_longer_resident() {
        let path = file("resident", &vec![1; 8 << 20]);
        let mapped = Mapped::open(&path).unwrap();
        let resident = || -> usize {
            let maps = std::fs::read_to_string("/proc/self/smaps").unwrap();
            let (_, ours) = maps.split_once(path.to_str().unwrap()).unwrap();
            let (_, kilobytes) = ours.split_once("\nRss:").unwrap();
            kilobytes
                .split_whitespace()
                .next()
                .unwrap()
                .parse()
                .unwrap()
        };
        assert_eq!(mapped.iter().filter(|b| **b == 1).count(), 8 << 20);
        assert_eq!(resident(), 8 << 10);
        mapped.forget(0..4 << 20);
        assert_eq!(resident(), 4 << 10);
        std::fs::remove_file(&path).unwrap();
    }

    #[test]
    fn rooms_are_zeroed_aligned_and_apart() {
        for arena in [Arena::default(), Arena::with_pieces(0)] {
            check_rooms(arena);
        }
    }

    fn check_rooms(arena: Arena) {
        let sizes = [1, 64, 100_000, PIECE, 65, 0, PIECE + 1];
        let mut rooms: Vec<Room> = sizes.iter().map(|n| arena.take(*n).unwrap()).collect();
        drop(arena);
        for (i, room) in rooms.iter_mut().enumerate() {
            assert_eq!(room.len(), sizes[i].next_multiple_of(LINE));
            assert!(room.as_ptr().addr().is_multiple_of(LINE));
            for at in (0..room.len()).step_by(4093) {
                assert_eq!(room[at], 0);
                room[at] = i as u8 + 1;
            }
        }
        for (i, room) in rooms.iter().enumerate() {
            assert!(
                (0..room.len())
                    .step_by(4093)
                    .all(|at| room[at] == i as u8 + 1)
            );
        }
    }

    #[test]
    fn more_than_there_is_is_an_error() {
        assert!(Arena::default().take(usize::MAX).is_err());
        assert!(Arena::default().take(usize::MAX / 2).is_err());
    }
}
