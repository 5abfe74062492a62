//! Tells an event loop, through a file descriptor, which of its streams have something.

use std::collections::BTreeSet;
use std::io::{self, Read, Write};
use std::os::fd::AsRawFd;
use std::os::unix::net::UnixStream;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use pyo3::prelude::*;

/// The side that engine threads hold.
pub struct Bell {
    /// Keys that rang since the last `drain`. A byte is in the pipe exactly while it is not empty.
    rung: Mutex<BTreeSet<u64>>,
    write: UnixStream,
    read: UnixStream,
}

impl Bell {
    /// Note `key`, and make the descriptor readable.
    pub fn ring(&self, key: u64) {
        let mut rung = self.lock();
        if rung.is_empty() {
            // One byte at a time always fits; there is nobody to tell if the pipe is broken.
            let _ = (&self.write).write(&[1]);
        }
        rung.insert(key);
    }

    fn lock(&self) -> MutexGuard<'_, BTreeSet<u64>> {
        self.rung.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Tells an event loop which of its streams have something: a file descriptor to watch.
#[pyclass(frozen, module = "hfcore._core")]
pub struct Notifier {
    bell: Arc<Bell>,
}

impl Notifier {
    pub fn bell(&self) -> Arc<Bell> {
        self.bell.clone()
    }
}

#[pymethods]
impl Notifier {
    #[new]
    fn new() -> io::Result<Self> {
        let (write, read) = UnixStream::pair()?;
        write.set_nonblocking(true)?;
        read.set_nonblocking(true)?;
        Ok(Self {
            bell: Arc::new(Bell {
                rung: Mutex::default(),
                write,
                read,
            }),
        })
    }

    /// Readable while `drain` has something to give. Owned by this object.
    fn fileno(&self) -> i32 {
        self.bell.read.as_raw_fd()
    }

    /// The keys of the streams that got something (or ended) since the last call, each once.
    fn drain(&self) -> Vec<u64> {
        let mut rung = self.bell.lock();
        if !rung.is_empty() {
            let _ = (&self.bell.read).read(&mut [0; 8]);
        }
        std::mem::take(&mut *rung).into_iter().collect()
    }

    fn __repr__(&self) -> String {
        format!("Notifier(fileno={})", self.fileno())
    }
}
