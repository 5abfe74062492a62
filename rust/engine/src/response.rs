//! How a family writes tool calls and thoughts: one value gives both the grammar and the streaming parser.

/// What a piece of text adds to a tool call.
#[derive(Debug, Clone, PartialEq, Eq, Default)]
pub struct CallDelta {
    /// Which of the turn's calls, from 0.
    pub index: usize,
    /// Its id and the tool's name, together with its first piece alone.
    pub id: Option<String>,
    pub name: Option<String>,
    /// The next piece of its arguments, which together are a JSON object.
    pub arguments: String,
}
