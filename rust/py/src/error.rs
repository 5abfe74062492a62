//! The engine's errors as the classes of `hfcore.errors`. Nothing else raises here.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use hfcore_engine::error::{Error, Result};
use pyo3::exceptions::PyRuntimeError;
use pyo3::prelude::*;
use pyo3::types::PyDict;

/// Run engine code without the GIL. A panic in it becomes an `InternalError`.
pub fn run<T: Send>(py: Python<'_>, work: impl FnOnce() -> Result<T> + Send) -> PyResult<T> {
    py.detach(|| guarded(work))
        .map_err(|error| to_py(py, error))
}

/// The same with the GIL kept, for work of a few microseconds.
pub fn run_here<T>(py: Python<'_>, work: impl FnOnce() -> Result<T>) -> PyResult<T> {
    guarded(work).map_err(|error| to_py(py, error))
}

/// `InvalidRequestError`, for what the door itself refuses.
pub fn invalid(py: Python<'_>, message: impl Into<String>) -> PyErr {
    to_py(py, Error::InvalidRequest(message.into()))
}

/// A panic as an error.
pub fn guarded<T>(work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|panic| {
        let text = panic.downcast_ref::<&str>().map(|text| (*text).to_owned());
        let text = text.or_else(|| panic.downcast_ref::<String>().cloned());
        Err(Error::Internal(
            text.unwrap_or_else(|| "a panic without a message".to_owned()),
        ))
    })
}

/// The Python exception for an engine error, with its attributes.
pub fn to_py(py: Python<'_>, error: Error) -> PyErr {
    // Failing to raise is a defect of the installation; Python's own error says which.
    build(py, &error).unwrap_or_else(|broken| {
        let raised = PyRuntimeError::new_err(error.to_string());
        raised.set_cause(py, Some(broken));
        raised
    })
}

fn build(py: Python<'_>, error: &Error) -> PyResult<PyErr> {
    let with = PyDict::new(py);
    let class = match error {
        Error::ModelFile { path, .. } => {
            with.set_item("path", path)?;
            if Path::new(path).exists() {
                "ModelFileError"
            } else {
                "ModelNotFoundError"
            }
        }
        Error::Unsupported { what, name, .. } => {
            with.set_item("what", what)?;
            with.set_item("name", name)?;
            "UnsupportedModelError"
        }
        Error::OutOfMemory { needed, available } => {
            with.set_item("needed", needed)?;
            with.set_item("available", available)?;
            "ModelTooLargeError"
        }
        Error::NoChatTemplate { model } => {
            with.set_item("model", model)?;
            "NoChatTemplateError"
        }
        Error::Template {
            name, line, thrown, ..
        } => {
            with.set_item("name", name)?;
            with.set_item("line", line)?;
            with.set_item("thrown", thrown)?;
            "TemplateError"
        }
        Error::InvalidRequest(_) => "InvalidRequestError",
        Error::UnknownOption { name, nearest } => {
            with.set_item("name", name)?;
            with.set_item("nearest", nearest)?;
            "UnknownOptionError"
        }
        Error::ContextOverflow { prompt, limit } => {
            with.set_item("prompt_tokens", prompt)?;
            with.set_item("limit", limit)?;
            "ContextOverflowError"
        }
        Error::Timeout { seconds } => {
            with.set_item("timeout", seconds)?;
            "RequestTimeoutError"
        }
        Error::Overloaded { waiting, limit } => {
            with.set_item("waiting", waiting)?;
            with.set_item("limit", limit)?;
            "EngineOverloadedError"
        }
        Error::Closed => "EngineClosedError",
        Error::Internal(_) => "InternalError",
    };
    let class = py.import("hfcore.errors")?.getattr(class)?;
    Ok(PyErr::from_value(
        class.call((error.to_string(),), Some(&with))?,
    ))
}
