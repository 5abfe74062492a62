//! The grammar of a style's calls, as text in llguidance's dialect of Lark. Nothing is compiled here.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::{Arguments, Kind, QUOTE, Style, Tags, Tool, invalid};
use crate::error::Result;

/// The deepest value that is typed by its schema; below it any value will do.
const DEEPEST: usize = 8;

/// Whoever knows the vocabulary, and what grammars can hold.
pub trait Lark {
    /// A Lark expression for `text`: quoted strings, and `<[id]>` where a part of it is one special token.
    fn literal(&self, text: &str) -> String;

    /// The body of a Lark rule for the JSON values of `schema`.
    ///
    /// # Errors
    /// The schema cannot be enforced.
    fn schema(&self, schema: &Value) -> Result<String>;
}

impl Style {
    /// The Lark grammar of a whole turn of calls, from its first character on.
    ///
    /// # Errors
    /// No tools; a schema that cannot be enforced.
    pub fn calls_grammar(&self, tools: &[&Tool], several: bool, lark: &dyn Lark) -> Result<String> {
        let mut writer = Writer::new(self, lark);
        writer.tools(tools)?;
        let mut start = String::new();
        if self.channels {
            start.push_str(&writer.thought());
        }
        if !self.lead.is_empty() {
            let _ = write!(start, "({})? ", lark.literal(self.lead));
        }
        let opening = [self.open, self.before].concat();
        writer.turn(&mut start, &opening, "call", several);
        Ok(writer.finish(&start))
    }

    /// What shows in free text that a call begins, each with the grammar of what follows it until the end of the turn.
    ///
    /// # Errors
    /// As [`Style::calls_grammar`].
    pub fn trigger(
        &self,
        tools: &[&Tool],
        several: bool,
        lark: &dyn Lark,
    ) -> Result<Vec<(String, String)>> {
        let opening = [self.open, self.before].concat();
        let mut triggers = Vec::new();
        if self.trigger.is_empty() {
            // Only the name of a tool tells a call from other text in brackets.
            for (at, tool) in tools.iter().enumerate() {
                let mut writer = Writer::new(self, lark);
                writer.tools(tools)?;
                let mut start = String::new();
                writer.turn(&mut start, "", &format!("rest{at}"), several);
                let marker = [opening.as_str(), &tool.name, self.after].concat();
                triggers.push((marker, writer.finish(&start)));
            }
            return Ok(triggers);
        }
        let mut add = |marker: &str, opening: &str| -> Result<()> {
            let mut writer = Writer::new(self, lark);
            writer.tools(tools)?;
            let mut start = String::new();
            writer.turn(&mut start, opening, "call", several);
            triggers.push((marker.to_string(), writer.finish(&start)));
            Ok(())
        };
        add(
            self.trigger,
            opening.strip_prefix(self.trigger).unwrap_or(&opening),
        )?;
        if !self.lead.is_empty() {
            add(self.lead, &opening)?;
        }
        Ok(triggers)
    }
}

/// A grammar as it is written.
struct Writer<'a> {
    style: &'a Style,
    lark: &'a dyn Lark,
    rules: String,
    count: usize,
    /// Whether the rules of any value of Gemma's are there.
    any: bool,
}

impl<'a> Writer<'a> {
    fn new(style: &'a Style, lark: &'a dyn Lark) -> Self {
        Self {
            style,
            lark,
            rules: String::new(),
            count: 0,
            any: false,
        }
    }

    /// `text` as an expression with a space behind; nothing for nothing.
    fn literal(&self, text: &str) -> String {
        if text.is_empty() {
            return String::new();
        }
        format!("{} ", self.lark.literal(text))
    }

    fn rule(&mut self, prefix: &str, attribute: &str, body: &str) -> String {
        let name = format!("{prefix}{}", self.count);
        self.count += 1;
        let body = if body.trim().is_empty() { "\"\"" } else { body };
        let _ = writeln!(self.rules, "{name}{attribute}: {}", body.trim());
        name
    }

    fn finish(self, start: &str) -> String {
        format!("start: {}\n{}", start.trim(), self.rules)
    }

    /// opening call (between before call)* close
    fn turn(&self, start: &mut String, opening: &str, first: &str, several: bool) {
        start.push_str(&self.literal(opening));
        start.push_str(first);
        start.push(' ');
        if several && self.style.several {
            let next = [self.style.between, self.style.before].concat();
            let _ = write!(start, "({}call)* ", self.literal(&next));
        }
        start.push_str(&self.literal(self.style.close));
    }

    /// A message of the analysis channel and the head of the next message, each optional.
    fn thought(&mut self) -> String {
        let Some((open, close)) = self.style.thought else {
            return String::new();
        };
        let text = self.until("", close);
        let open = self.literal(open);
        let next = self.literal("<|start|>assistant");
        format!("({open}{text})? ({next})? ")
    }

    /// The rules `call` (any of the tools) and `rest0`, `rest1` ... (what follows a tool's name).
    fn tools(&mut self, tools: &[&Tool]) -> Result<()> {
        if tools.is_empty() {
            return invalid("tools: a call is wanted, but there are no tools".into());
        }
        let mut calls = Vec::new();
        for (at, tool) in tools.iter().enumerate() {
            let arguments = self.arguments(tool)?;
            let end = self.literal(self.style.end);
            // The engine may take harmony's last marker for the end of the turn.
            let end = if self.style.channels {
                format!("({end})?")
            } else {
                end
            };
            let _ = writeln!(
                self.rules,
                "rest{at}: {}",
                or_empty(&format!("{arguments} {end}"))
            );
            let name = [&tool.name, self.style.after].concat();
            calls.push(format!("{}rest{at}", self.literal(&name)));
        }
        let _ = writeln!(self.rules, "call: {}", calls.join(" | "));
        Ok(())
    }

    fn arguments(&mut self, tool: &Tool) -> Result<String> {
        match self.style.arguments {
            Arguments::Json | Arguments::Envelope => {
                let body = self.lark.schema(&tool.parameters)?;
                Ok(self.rule("args", "", &body))
            }
            Arguments::Tagged(tags) => {
                self.members(tool, &tool.parameters, "", |w, key, schema| {
                    w.tagged(tags, key, schema, &tool.parameters)
                })
            }
            Arguments::Python => self.members(tool, &tool.parameters, ", ", |w, key, schema| {
                let body = w.lark.schema(&with_definitions(schema, &tool.parameters))?;
                let value = w.rule("value", "", &body);
                Ok(format!("{}{value}", w.literal(&format!("{key}="))))
            }),
            Arguments::Gemma => self.gemma_members(tool, &tool.parameters, 0),
        }
    }

    /// A schema's properties in their order, the optional ones optional, `separator` between two.
    fn members(
        &mut self,
        tool: &Tool,
        schema: &Value,
        separator: &str,
        mut member: impl FnMut(&mut Self, &str, &Value) -> Result<String>,
    ) -> Result<String> {
        let none = Map::new();
        let properties = schema
            .get("properties")
            .and_then(Value::as_object)
            .unwrap_or(&none);
        let required: Vec<&str> = schema
            .get("required")
            .and_then(Value::as_array)
            .into_iter()
            .flatten()
            .filter_map(Value::as_str)
            .collect();
        if let Some(lost) = required.iter().find(|key| !properties.contains_key(**key)) {
            return invalid(format!(
                "tools: {:?} requires {lost:?}, which is none of its properties",
                tool.name
            ));
        }
        let mut members = Vec::new();
        for (key, schema) in properties {
            let body = member(self, key, schema)?;
            let rule = self.rule("member", "", &body);
            members.push((rule, required.contains(&key.as_str())));
        }
        if separator.is_empty() {
            let line: Vec<String> = members
                .iter()
                .map(|(rule, wanted)| format!("{rule}{}", if *wanted { "" } else { "?" }))
                .collect();
            return Ok(line.join(" "));
        }
        Ok(self.separated(&members, separator))
    }

    /// Rules from the last member back: `none` while no member was written, `some` after one was.
    fn separated(&mut self, members: &[(String, bool)], separator: &str) -> String {
        let separator = self.literal(separator);
        let mut rest: Option<(String, String)> = None;
        for (member, wanted) in members.iter().rev() {
            let (none, some) = match &rest {
                Some((none, some)) => (none.as_str(), some.as_str()),
                None => ("", ""),
            };
            let mut first = format!("{member} {some}");
            let mut later = format!("{separator}{member} {some}");
            if !wanted {
                let _ = write!(first, " | {}", or_empty(none));
                let _ = write!(later, " | {}", or_empty(some));
            }
            let none = self.rule("none", "", &first);
            let some = self.rule("some", "", &later);
            rest = Some((none, some));
        }
        rest.map(|(none, _)| none).unwrap_or_default()
    }

    fn tagged(&mut self, tags: Tags, key: &str, schema: &Value, root: &Value) -> Result<String> {
        let head = self.literal(&[tags.key.0, key, tags.key.1].concat());
        let (before, marker, after) = tags.value;
        if Kind::of(schema, root) == Kind::Json {
            let body = self.lark.schema(&with_definitions(schema, root))?;
            let value = self.rule("value", "", &body);
            let end = self.literal(&[before, marker, after].concat());
            return Ok(format!("{head}{value} {end}"));
        }
        if let Some(choices) = self.choices(schema, &[before, marker].concat()) {
            return Ok(format!("{head}({choices}) {}", self.literal(after)));
        }
        let text = self.until(before, marker);
        Ok(format!("{head}{text} {}", self.literal(after)))
    }

    /// The strings of an enumeration, each with `end` behind it.
    fn choices(&self, schema: &Value, end: &str) -> Option<String> {
        let values = schema.get("enum")?.as_array()?;
        let mut choices = Vec::new();
        for value in values {
            let text = [value.as_str()?, end].concat();
            choices.push(self.literal(&text));
        }
        (!choices.is_empty()).then(|| choices.join("| "))
    }

    /// Text up to and with the first `before` + `marker`.
    fn until(&mut self, before: &str, marker: &str) -> String {
        let literal = self.lark.literal(marker);
        if literal.starts_with("<[") {
            // A special token is no text: nothing else can be it.
            let text = self.rule("text", "", &format!("/(.|\\n)*{}/", escape(before)));
            return format!("{text} {literal}");
        }
        let body = format!("/(.|\\n)*{}{}/", escape(before), escape(marker));
        self.rule("text", "[lazy]", &body)
    }

    fn gemma_members(&mut self, tool: &Tool, schema: &Value, depth: usize) -> Result<String> {
        self.members(tool, schema, ",", |w, key, schema| {
            let value = w.gemma(tool, schema, depth + 1)?;
            Ok(format!("{}{value}", w.literal(&format!("{key}:"))))
        })
    }

    /// A value as Gemma 4 writes it: bare keys, strings in its own quotes.
    fn gemma(&mut self, tool: &Tool, schema: &Value, depth: usize) -> Result<String> {
        let root = &tool.parameters;
        let quote = self.literal(QUOTE);
        if Kind::of(schema, root) == Kind::Text {
            if let Some(choices) = self.choices(schema, QUOTE) {
                return Ok(format!("{quote}({choices})"));
            }
            return Ok(format!("{quote}{}", self.until("", QUOTE)));
        }
        let plain = schema.get("anyOf").is_none() && depth < DEEPEST;
        match schema.get("type").and_then(Value::as_str) {
            Some("number" | "integer" | "boolean" | "null") => {
                let body = self.lark.schema(schema)?;
                Ok(self.rule("value", "", &body))
            }
            Some("array") if plain && schema.get("items").is_some_and(Value::is_object) => {
                let item = self.gemma(tool, &schema["items"], depth + 1)?;
                let item = self.rule("item", "", &item);
                let one_more = format!("\",\" {item}");
                Ok(format!("\"[\" ({item} ({one_more})*)? \"]\""))
            }
            Some("object") if plain && schema.get("properties").is_some_and(Value::is_object) => {
                let members = self.gemma_members(tool, schema, depth)?;
                Ok(format!("\"{{\" {members} \"}}\""))
            }
            _ => Ok(self.gemma_any()),
        }
    }

    fn gemma_any(&mut self) -> String {
        if !self.any {
            self.any = true;
            let quote = self.literal(QUOTE);
            let text = self.until("", QUOTE);
            let _ = write!(
                self.rules,
                "any: {quote}{text} | NUMBER | \"true\" | \"false\" | \"null\" | \"[\" (any (\",\" any)*)? \"]\" \
                 | \"{{\" (pair (\",\" pair)*)? \"}}\"\npair: KEY \":\" any\n\
                 NUMBER: /-?(0|[1-9][0-9]*)(\\.[0-9]+)?([eE][-+]?[0-9]+)?/\nKEY: /[A-Za-z0-9_.\\-]+/\n"
            );
        }
        "any".into()
    }
}

fn or_empty(body: &str) -> &str {
    if body.trim().is_empty() { "\"\"" } else { body }
}

/// A property's schema with the definitions of the whole, to which it may refer.
fn with_definitions(schema: &Value, root: &Value) -> Value {
    let mut schema = schema.clone();
    for key in ["$defs", "definitions"] {
        if let (Some(fields), Some(found)) = (schema.as_object_mut(), root.get(key)) {
            fields.entry(key).or_insert_with(|| found.clone());
        }
    }
    schema
}

/// `text` inside `/.../`.
fn escape(text: &str) -> String {
    let mut escaped = String::new();
    for c in text.chars() {
        match c {
            '\n' => escaped.push_str("\\n"),
            '\\' | '/' | '.' | '+' | '*' | '?' | '(' | ')' | '|' | '[' | ']' | '{' | '}' | '^'
            | '$' => {
                escaped.push('\\');
                escaped.push(c);
            }
            other => escaped.push(other),
        }
    }
    escaped
}
