//! `Stream` and `Notifier` for Python: waiting without the GIL, by thread or by event loop.

use std::sync::Arc;
use std::time::Duration;

use hfcore_engine::stream;
use hfcore_engine::tokenizer::Tokenizer;
use pyo3::exceptions::PyStopIteration;
use pyo3::prelude::*;

use crate::delta::Delta;
use crate::error::{run, to_py};

/// How long Ctrl-C may go unnoticed.
const TICK: Duration = Duration::from_millis(100);

/// The deltas of one request as they come, those of several completions mixed. Dropping or closing
/// it cancels the request.
#[pyclass(frozen, module = "hfcore._core")]
pub struct Stream {
    inner: stream::Stream,
    tokenizer: Arc<Tokenizer>,
}

impl Stream {
    pub fn new(inner: stream::Stream, tokenizer: Arc<Tokenizer>) -> Self {
        Self { inner, tokenizer }
    }

    fn receive(&self, py: Python<'_>, patience: Duration) -> PyResult<Option<Delta>> {
        let delta = run(py, || self.inner.recv_timeout(patience))?;
        Ok(delta.map(|delta| Delta::new(&self.tokenizer, delta)))
    }

    /// With the GIL: taking a delta is quicker than getting that back, for which an event loop may
    /// wait 5 ms while another thread computes.
    fn receive_now(&self, py: Python<'_>) -> PyResult<Option<Delta>> {
        let delta = self.inner.try_recv().map_err(|error| to_py(py, error))?;
        Ok(delta.map(|delta| Delta::new(&self.tokenizer, delta)))
    }
}

#[pymethods]
impl Stream {
    fn __iter__(this: Py<Self>) -> Py<Self> {
        this
    }

    /// Wait for the next delta. Ctrl-C interrupts the wait within 0.1 seconds.
    fn __next__(&self, py: Python<'_>) -> PyResult<Option<Delta>> {
        loop {
            // Each time, since in `list(stream)` nobody else looks.
            py.check_signals()?;
            if let Some(delta) = self.receive(py, TICK)? {
                return Ok(Some(delta));
            }
            if self.inner.ended() {
                return Ok(None);
            }
        }
    }

    /// The next delta if it is there, None if not yet. Raises StopIteration after the last.
    fn try_next(&self, py: Python<'_>) -> PyResult<Option<Delta>> {
        let delta = self.receive_now(py)?;
        if delta.is_none() && self.inner.ended() {
            return Err(PyStopIteration::new_err(()));
        }
        Ok(delta)
    }

    /// From now on put `key` into `notifier` whenever something comes; at once if it has.
    fn subscribe(&self, notifier: &Notifier, key: u64) {
        self.inner.subscribe(&notifier.inner, key);
    }

    /// Cancel the request, unless it has ended. A second call does nothing.
    fn close(&self) {
        self.inner.cancel();
    }

    fn __repr__(&self) -> String {
        let state = if self.inner.ended() { "ended" } else { "open" };
        format!("Stream({state})")
    }
}

/// Tells an event loop which of its streams have something: a file descriptor to watch.
#[pyclass(frozen, module = "hfcore._core")]
pub struct Notifier {
    inner: Arc<stream::Notifier>,
}

#[pymethods]
impl Notifier {
    #[new]
    fn new(py: Python<'_>) -> PyResult<Self> {
        Ok(Self {
            inner: Arc::new(run(py, stream::Notifier::new)?),
        })
    }

    /// Readable while `drain` has something to give. Owned by this object.
    fn fileno(&self) -> i32 {
        self.inner.fd()
    }

    /// The keys of the streams that got something (or ended) since the last call, each once.
    fn drain(&self) -> Vec<u64> {
        self.inner.drain()
    }

    fn __repr__(&self) -> String {
        format!("Notifier(fileno={})", self.inner.fd())
    }
}
