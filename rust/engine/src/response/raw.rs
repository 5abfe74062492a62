//! What a schema asks of a string that is written without quotes, as regular expressions. JSON's own strings are
//! llguidance's part.

use serde_json::Value;

use super::grammar::escape;
use super::invalid;
use crate::error::Result;

/// The most definitions in a row that a schema refers to.
const DEEPEST: usize = 8;
/// The longest `minLength` or `maxLength`.
const LONGEST: u64 = 1 << 20;
/// What no expression says.
const REFUSED: [&str; 5] = ["allOf", "not", "if", "then", "else"];
const BOUNDS: [&str; 5] = ["pattern", "minLength", "maxLength", "enum", "const"];

/// The schema that `schema` stands for: a reference, or an `allOf` of one, followed.
pub(super) fn resolved<'a>(mut schema: &'a Value, root: &'a Value) -> &'a Value {
    for _ in 0..DEEPEST {
        let path = schema.get("$ref").and_then(Value::as_str);
        let found = path.and_then(|path| root.pointer(path.strip_prefix('#')?));
        let only = match schema.get("allOf").and_then(Value::as_array) {
            Some(parts) if parts.len() == 1 && schema.get("type").is_none() => parts.first(),
            _ => None,
        };
        match found.or(only) {
            Some(next) => schema = next,
            None => break,
        }
    }
    schema
}

/// The choices between schemas, if it is one.
pub(super) fn branches(schema: &Value) -> Option<&Vec<Value>> {
    let choices = schema.get("anyOf").or_else(|| schema.get("oneOf"))?;
    choices.as_array().filter(|choices| !choices.is_empty())
}

/// The schema of several types, for one of them.
pub(super) fn of_type(schema: &Value, name: &Value) -> Value {
    let mut schema = schema.clone();
    schema["type"] = name.clone();
    schema
}

/// What a schema of several types says of strings; none where it does not say which types those are.
pub(super) fn string_branch(schema: &Value, root: &Value) -> Option<Value> {
    let schema = resolved(schema, root);
    let strings = |schema: &Value| schema.get("type").is_some_and(|kind| kind == "string");
    if let Some(branches) = branches(schema) {
        let mut found: Vec<Value> = branches
            .iter()
            .map(|branch| resolved(branch, root))
            .filter(|branch| strings(branch) || branch.get("enum").is_some())
            .cloned()
            .collect();
        return match found.len() {
            0 => None,
            1 => found.pop(),
            _ => Some(serde_json::json!({"anyOf": found})),
        };
    }
    let bound = BOUNDS.iter().any(|key| schema.get(*key).is_some());
    match schema.get("type") {
        Some(Value::Array(types)) if types.iter().any(|name| name == "string") => {
            Some(of_type(schema, &"string".into()))
        }
        // Without a type, bounds hold for strings alone.
        None if bound => Some(of_type(schema, &"string".into())),
        _ => None,
    }
}

/// Whether a schema of strings asks for anything more.
pub(super) fn is_bound(schema: &Value, root: &Value) -> bool {
    let schema = resolved(schema, root);
    match branches(schema) {
        Some(branches) => branches.iter().any(|branch| is_bound(branch, root)),
        None => BOUNDS
            .iter()
            .chain(&REFUSED)
            .any(|key| schema.get(*key).is_some()),
    }
}

/// What a schema of strings asks for.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Bounds {
    /// One of these; any text, if there are none.
    pub choices: Vec<String>,
    pattern: Option<String>,
    least: u64,
    most: Option<u64>,
}

impl Bounds {
    /// # Errors
    /// What cannot be enforced, or cannot be met.
    pub(super) fn of(schema: &Value) -> Result<Self> {
        if let Some(key) = REFUSED.iter().find(|key| schema.get(**key).is_some()) {
            return invalid(format!(
                "tools: {key:?} of a string cannot be enforced where it is written without quotes"
            ));
        }
        let mut choices = Vec::new();
        if let Some(values) = schema.get("enum").and_then(Value::as_array) {
            choices.extend(values.iter().filter_map(Value::as_str).map(str::to_string));
        }
        if let Some(only) = schema.get("const").and_then(Value::as_str) {
            choices = vec![only.to_string()];
        }
        let bounds = Self {
            choices,
            pattern: match schema.get("pattern") {
                None => None,
                Some(Value::String(pattern)) => Some(search(pattern)?),
                Some(other) => {
                    return invalid(format!("tools: a pattern must be text, {other:.60} came"));
                }
            },
            least: length(schema, "minLength")?.unwrap_or(0),
            most: length(schema, "maxLength")?,
        };
        match bounds.most {
            Some(most) if most < bounds.least => invalid(format!(
                "tools: no text has minLength {} and maxLength {most}",
                bounds.least
            )),
            _ => Ok(bounds),
        }
    }

    pub(super) fn is_none(&self) -> bool {
        *self == Self::default()
    }

    pub(super) fn only_choices(&self) -> bool {
        self.pattern.is_none() && self.least == 0 && self.most.is_none()
    }

    /// Expressions that the text meets, each as a whole, unless it asks for nothing.
    pub(super) fn expressions(&self) -> Vec<String> {
        let mut all = Vec::new();
        if !self.choices.is_empty() {
            let choices: Vec<String> = self.choices.iter().map(|text| escape(text)).collect();
            all.push(choices.join("|"));
        }
        all.extend(self.pattern.clone());
        if self.least > 0 || self.most.is_some() {
            let most = self.most.map(|most| most.to_string()).unwrap_or_default();
            all.push(format!("(.|\\n){{{},{most}}}", self.least));
        }
        all
    }
}

fn length(schema: &Value, key: &str) -> Result<Option<u64>> {
    let Some(value) = schema.get(key) else {
        return Ok(None);
    };
    match value.as_f64() {
        Some(n) if n.fract() == 0.0 && (0.0..=LONGEST as f64).contains(&n) => Ok(Some(n as u64)),
        _ => invalid(format!(
            "tools: {key} must be a whole number up to {LONGEST}, {value:.60} came"
        )),
    }
}

/// A pattern, which may match anywhere, as an expression of the whole text within `/.../`.
fn search(pattern: &str) -> Result<String> {
    let refuse = |what: &str| {
        invalid(format!(
            "tools: the pattern {pattern:?} cannot be enforced where text is written without quotes: it has {what}"
        ))
    };
    let (mut body, starts) = match pattern.strip_prefix('^') {
        Some(rest) => (rest, true),
        None => (pattern, false),
    };
    let slashes = body
        .strip_suffix('$')
        .map(|rest| rest.len() - rest.trim_end_matches('\\').len());
    let ends = slashes.is_some_and(|n| n % 2 == 0);
    if ends {
        body = &body[..body.len() - 1];
    }
    let mut expression = String::new();
    let (mut class, mut depth) = (false, 0usize);
    let mut chars = body.chars().peekable();
    while let Some(c) = chars.next() {
        match c {
            '\\' => match chars.next() {
                None => return refuse("a lone backslash at its end"),
                Some('b' | 'B' | 'A' | 'z' | 'Z' | 'G') if !class => return refuse("an assertion"),
                Some('0'..='9' | 'k') => return refuse("a reference to a group"),
                Some(next) => expression.extend(['\\', next]),
            },
            '[' if class => return refuse("a class in a class"),
            '[' => {
                class = true;
                expression.push(c);
                // A bracket that comes first is one of the class.
                for first in ['^', ']'] {
                    if chars.next_if_eq(&first).is_some() {
                        expression.push_str(if first == '^' { "^" } else { "\\]" });
                    }
                }
            }
            ']' if class => {
                class = false;
                expression.push(c);
            }
            '^' | '$' if !class => return refuse("an anchor in its middle"),
            '(' if !class => {
                depth += 1;
                expression.push(c);
                if chars.next_if_eq(&'?').is_some() {
                    if chars.next() != Some(':') {
                        return refuse("a group that looks around or sets flags");
                    }
                    expression.push_str("?:");
                }
            }
            ')' if !class => {
                depth = depth.saturating_sub(1);
                expression.push(c);
            }
            '|' if !class && depth == 0 && (starts || ends) => {
                return refuse("anchors beside alternatives; put those in a group");
            }
            '/' => expression.push_str("\\/"),
            '\n' => expression.push_str("\\n"),
            other => expression.push(other),
        }
    }
    let any = |anchored: bool| if anchored { "" } else { "(.|\\n)*" };
    Ok(format!("{}({expression}){}", any(starts), any(ends)))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_pattern_matches_anywhere_unless_it_is_anchored() {
        for (pattern, wanted) in [
            ("a", "(.|\\n)*(a)(.|\\n)*"),
            ("^a/b$", "(a\\/b)"),
            ("^a\\$", "(a\\$)(.|\\n)*"),
            ("^(a|b)$", "((a|b))"),
            ("a|b", "(.|\\n)*(a|b)(.|\\n)*"),
            ("^[]^a/]$", "([\\]^a\\/])"),
        ] {
            assert_eq!(search(pattern).unwrap(), wanted, "{pattern}");
        }
    }

    #[test]
    fn what_no_expression_says_is_refused_by_name() {
        for (pattern, wanted) in [
            ("a^b", "an anchor in its middle"),
            ("^a|b$", "put those in a group"),
            ("(?=a)b", "looks around"),
            ("(?i)a", "sets flags"),
            ("(a)\\1", "a reference to a group"),
            ("\\ba", "an assertion"),
            ("a\\", "a lone backslash"),
        ] {
            let error = search(pattern).unwrap_err().to_string();
            assert!(error.contains(wanted), "{pattern}: {error}");
        }
    }
}
