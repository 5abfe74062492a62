//! How a model family writes tool calls and thoughts: one value, a [`Style`], gives both the grammar that
//! makes a model write a call and the parser that reads it back. It knows no tokens and compiles no grammar.

mod arguments;
mod grammar;
mod head;
mod literal;
mod parser;
mod raw;
mod style;
#[cfg(test)]
mod tests;

use serde_json::{Map, Value, json};

use crate::error::{Error, Result};
use crate::options::nearest;

pub use grammar::Lark;
pub use parser::{Parsed, Parser};
#[cfg(test)]
use style::STYLES;
pub use style::Style;
use style::{Arguments, NUMBER, QUOTE, Tags};

/// The longest name of a tool, in bytes.
const LONGEST_NAME: usize = 256;

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

/// A tool that the model may call.
#[derive(Debug, Clone, PartialEq)]
pub struct Tool {
    pub name: String,
    /// A JSON schema, always an object.
    pub parameters: Value,
}

/// The tools of an OpenAI-shaped list: `{"type": "function", "function": {...}}`, or the inner object alone.
///
/// # Errors
/// No list, no name, a name twice, a name with characters outside `[A-Za-z0-9_.-]`, parameters that are no object.
pub fn tools_of(list: &Value) -> Result<Vec<Tool>> {
    let Value::Array(items) = list else {
        return invalid(format!("tools: a list is wanted, {} came", kind_of(list)));
    };
    let mut tools: Vec<Tool> = Vec::with_capacity(items.len());
    for (at, item) in items.iter().enumerate() {
        let tool = tool_of(item, at)?;
        if tools.iter().any(|other| other.name == tool.name) {
            return invalid(format!("tools: two are named {:?}", tool.name));
        }
        tools.push(tool);
    }
    Ok(tools)
}

fn tool_of(item: &Value, at: usize) -> Result<Tool> {
    let inner = item.get("function").unwrap_or(item);
    let Some(fields) = inner.as_object() else {
        return invalid(format!(
            "tools[{at}]: an object is wanted, {} came",
            kind_of(inner)
        ));
    };
    let name = match fields.get("name") {
        Some(Value::String(name)) => name,
        Some(other) => {
            return invalid(format!(
                "tools[{at}]: the name must be text, {} came",
                kind_of(other)
            ));
        }
        None => return invalid(format!("tools[{at}]: a tool needs a name")),
    };
    if name.is_empty() || name.len() > LONGEST_NAME {
        return invalid(format!(
            "tools[{at}]: a name has 1 to {LONGEST_NAME} bytes, this one {}",
            name.len()
        ));
    }
    let wrong = |c: &char| !(c.is_ascii_alphanumeric() || "_.-".contains(*c));
    if let Some(wrong) = name.chars().find(wrong) {
        return invalid(format!(
            "tools[{at}]: a name has letters, digits, '_', '.' and '-', {name:?} has {wrong:?}"
        ));
    }
    let parameters = match fields.get("parameters") {
        None | Some(Value::Null) => json!({"type": "object", "properties": {}}),
        Some(Value::Object(schema)) => Value::Object(object_schema(schema)),
        Some(other) => {
            return invalid(format!(
                "tools: the parameters of {name:?} must be an object, {} came",
                kind_of(other)
            ));
        }
    };
    Ok(Tool {
        name: name.clone(),
        parameters,
    })
}

/// A schema of arguments says that they are an object, if it says nothing itself.
fn object_schema(schema: &Map<String, Value>) -> Map<String, Value> {
    let mut schema = schema.clone();
    schema.entry("type").or_insert_with(|| "object".into());
    schema
}

/// Which tools the model may, or has to, call.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ToolChoice {
    None,
    Auto,
    Required,
    Named(String),
}

impl ToolChoice {
    /// Reads every spelling of OpenAI's, Anthropic's and LangChain's `tool_choice`.
    ///
    /// # Errors
    /// A tool that is not among `tools`, a call required of no tools, or another shape.
    pub fn parse(value: &Value, tools: &[Tool]) -> Result<Self> {
        let choice = match value {
            Value::Null => return Ok(Self::Auto),
            Value::Bool(true) => Self::Required,
            Value::Bool(false) => Self::None,
            Value::String(word) => Self::of_word(word, tools)?,
            Value::Object(fields) => Self::of_object(fields, tools)?,
            other => return Err(Self::wanted(other)),
        };
        if choice == Self::Required && tools.is_empty() {
            return invalid("tool_choice: a call is required, but there are no tools".into());
        }
        Ok(choice)
    }

    fn of_word(word: &str, tools: &[Tool]) -> Result<Self> {
        Ok(match word {
            "none" => Self::None,
            "auto" => Self::Auto,
            "required" | "any" => Self::Required,
            name => Self::of_name(name, tools)?,
        })
    }

    fn of_object(fields: &Map<String, Value>, tools: &[Tool]) -> Result<Self> {
        let name = fields
            .get("function")
            .and_then(|function| function.get("name"))
            .or_else(|| fields.get("name"));
        match (name, fields.get("type")) {
            (Some(Value::String(name)), _) => Self::of_name(name, tools),
            (None, Some(Value::String(word)))
                if ["none", "auto", "any", "required"].contains(&word.as_str()) =>
            {
                Self::of_word(word, tools)
            }
            _ => Err(Self::wanted(&Value::Object(fields.clone()))),
        }
    }

    fn of_name(name: &str, tools: &[Tool]) -> Result<Self> {
        let names: Vec<&str> = tools.iter().map(|tool| tool.name.as_str()).collect();
        if names.contains(&name) {
            return Ok(Self::Named(name.to_string()));
        }
        let hint = match nearest(name, &names) {
            Some(near) => format!("; did you mean {near:?}?"),
            None => String::new(),
        };
        invalid(format!(
            "tool_choice: no tool is named {name:?}; the tools are {names:?}{hint}"
        ))
    }

    fn wanted(value: &Value) -> Error {
        let mut came = value.to_string();
        if let Some((end, _)) = came.char_indices().nth(100) {
            came.truncate(end);
            came.push_str("...");
        }
        Error::InvalidRequest(format!(
            "tool_choice: \"none\", \"auto\", \"required\" or a tool is wanted, {came} came"
        ))
    }
}

/// What the parser does about thoughts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Thinking {
    /// Text is text. (Harmony's channels are read all the same: its answers have no other form.)
    Off,
    /// A marker at the start of the turn begins a thought.
    Possible,
    /// The prompt ended inside a thought.
    Begun,
}

/// How a value is written where the style writes strings without quotes.
#[derive(Debug, Clone, PartialEq)]
enum Kind {
    /// Always a string.
    Text,
    /// A string, or JSON of one of these types (any type, if there are none).
    Mixed(Vec<String>),
    /// Never a string.
    Json,
}

impl Kind {
    /// The kind of a property's schema; `root` has the definitions it may refer to.
    fn of(schema: &Value, root: &Value) -> Self {
        let mut types = Vec::new();
        gather_types(schema, root, 0, &mut types);
        types.dedup();
        let text = types.iter().any(|name| name == "string");
        if types.iter().any(|name| name == "any") {
            return Self::Mixed(Vec::new());
        }
        types.retain(|name| name != "string");
        match (text, types.is_empty()) {
            (true, true) => Self::Text,
            (true, false) => Self::Mixed(types),
            (false, _) => Self::Json,
        }
    }
}

/// The names of the types a schema admits, "any" where it does not say.
fn gather_types(schema: &Value, root: &Value, depth: usize, types: &mut Vec<String>) {
    const DEEPEST: usize = 8;
    let mut add = |name: &str| types.push(name.to_string());
    if depth > DEEPEST {
        return add("any");
    }
    if let Some(name) = schema.get("$ref").and_then(Value::as_str) {
        return match name.strip_prefix('#').and_then(|path| root.pointer(path)) {
            Some(found) => gather_types(found, root, depth + 1, types),
            None => add("any"),
        };
    }
    if let Some(Value::Array(values)) = schema.get("enum") {
        return values.iter().for_each(|value| add(type_of(value)));
    }
    if let Some(value) = schema.get("const") {
        return add(type_of(value));
    }
    match schema.get("type") {
        Some(Value::String(name)) => return add(name),
        Some(Value::Array(names)) => {
            return names.iter().filter_map(Value::as_str).for_each(add);
        }
        _ => {}
    }
    if let Some(Value::Array(parts)) = schema.get("allOf")
        && let [part] = &parts[..]
    {
        return gather_types(part, root, depth + 1, types);
    }
    match schema.get("anyOf").or_else(|| schema.get("oneOf")) {
        Some(Value::Array(choices)) if !choices.is_empty() => {
            for choice in choices {
                gather_types(choice, root, depth + 1, types);
            }
        }
        _ => add("any"),
    }
}

/// JSON schema's name of a value's type.
fn type_of(value: &Value) -> &'static str {
    match value {
        Value::Null => "null",
        Value::Bool(_) => "boolean",
        Value::Number(_) => "number",
        Value::String(_) => "string",
        Value::Array(_) => "array",
        Value::Object(_) => "object",
    }
}

fn kind_of(value: &Value) -> String {
    match value {
        Value::Null => "null".into(),
        Value::Array(_) | Value::Object(_) => format!("an {}", type_of(value)),
        other => format!("a {}", type_of(other)),
    }
}

fn invalid<T>(message: String) -> Result<T> {
    Err(Error::InvalidRequest(message))
}
