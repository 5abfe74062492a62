//! What can go wrong, one variant per thing the caller can do about it.

/// Every failure of the engine. Messages say what was wanted and what came.
#[derive(Debug, Clone, thiserror::Error)]
pub enum Error {
    /// A model, tokenizer or template file is missing, cut short, foreign or inconsistent.
    #[error("{path}: {problem}")]
    ModelFile { path: String, problem: String },

    /// The file is sound, but asks for something this engine does not have.
    #[error("unsupported {what} {name:?}; supported: {supported}")]
    Unsupported {
        what: &'static str,
        name: String,
        supported: String,
    },

    /// Weights and cache would not fit into the memory that is free.
    #[error("the model needs {needed} bytes, {available} are free")]
    OutOfMemory { needed: u64, available: u64 },

    /// A chat was asked of a model that has no chat template.
    #[error("{model} has no chat template; pass chat_template=, or a plain text prompt")]
    NoChatTemplate { model: String },

    /// The chat template cannot be parsed, or refused these messages. `thrown` is true when the
    /// template itself raised (`raise_exception`), so that another shape of messages may do.
    #[error("chat template {name:?}, line {line}: {message}")]
    Template {
        name: String,
        line: usize,
        message: String,
        thrown: bool,
    },

    /// A request that no model could run.
    #[error("{0}")]
    InvalidRequest(String),

    /// An option nobody knows.
    #[error("unknown option {name:?}{}", nearest.as_ref().map(|n| format!("; did you mean {n:?}?")).unwrap_or_default())]
    UnknownOption {
        name: String,
        nearest: Option<String>,
    },

    /// The prompt does not fit.
    #[error("prompt has {prompt} tokens, the context holds {limit}")]
    ContextOverflow { prompt: usize, limit: usize },

    /// The request's own `timeout` passed before it ended.
    #[error("the request took longer than its timeout of {seconds} s")]
    Timeout { seconds: f64 },

    /// Too many requests wait already; a later attempt may do.
    #[error("{waiting} requests are waiting, the queue holds {limit}")]
    Overloaded { waiting: usize, limit: usize },

    /// The engine was closed before the request ended.
    #[error("the engine is closed")]
    Closed,

    /// A defect of this library: a panic in a step, caught. The engine lives on.
    #[error("internal error: {0}")]
    Internal(String),
}

/// A result of the engine.
pub type Result<T> = std::result::Result<T, Error>;
