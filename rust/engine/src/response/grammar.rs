//! The grammar of a style's calls, as text in llguidance's dialect of Lark. Nothing is compiled here.

use std::fmt::Write as _;

use serde_json::{Map, Value};

use super::raw::{self, Bounds};
use super::{Arguments, Kind, NUMBER, QUOTE, Style, Tags, Tool, invalid};
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
    /// The markers that are special tokens of this vocabulary.
    special: Vec<&'static str>,
}

impl<'a> Writer<'a> {
    fn new(style: &'a Style, lark: &'a dyn Lark) -> Self {
        Self {
            style,
            lark,
            rules: String::new(),
            count: 0,
            any: false,
            special: style
                .markers()
                .into_iter()
                .filter(|marker| is_token(&lark.literal(marker)))
                .collect(),
        }
    }

    /// `text` as an expression with a space behind; nothing for nothing.
    fn literal(&self, text: &str) -> String {
        let mut expression = String::new();
        for (at, part) in text.split(NUMBER).enumerate() {
            if at > 0 {
                expression.push_str("/[0-9]{1,4}/ ");
            }
            self.words(part, &mut expression);
        }
        expression
    }

    /// `text` without numbers, its special tokens as such.
    fn words(&self, mut text: &str, expression: &mut String) {
        let mut add = |part: &str| {
            if !part.is_empty() {
                let _ = write!(expression, "{} ", self.lark.literal(part));
            }
        };
        while let Some((at, marker)) = self
            .special
            .iter()
            .filter_map(|marker| Some((text.find(marker)?, *marker)))
            .min()
        {
            add(&text[..at]);
            add(marker);
            text = &text[at + marker.len()..];
        }
        add(text);
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
        let json_head = self.literal(&[tags.key.0, key, tags.json.unwrap_or(tags.key.1)].concat());
        let (before, marker, after) = tags.value;
        let after = self.literal(after);
        let end = self.literal(&[before, marker].concat());
        let kind = Kind::of(schema, root);
        if kind == Kind::Json {
            let value = self.json(schema, root)?;
            return Ok(format!("{json_head}{value} {end}{after}"));
        }
        if kind == Kind::Text {
            let text = self.raw(schema, root, before, marker)?;
            return Ok(format!("{head}{text} {after}"));
        }
        if tags.json.is_some() {
            let text = match raw::string_branch(schema, root) {
                Some(schema) => self.raw(&schema, root, before, marker)?,
                None => self.until(before, marker),
            };
            let value = self.json(schema, root)?;
            return Ok(format!("({head}{text} | {json_head}{value} {end}) {after}"));
        }
        let Some(strings) = raw::string_branch(schema, root).filter(|s| raw::is_bound(s, root))
        else {
            return Ok(format!("{head}{} {after}", self.until(before, marker)));
        };
        // A word without quotes is read as JSON where it may be: only these cannot break a bound of their own.
        let plain = |kind: &Kind| {
            matches!(kind, Kind::Mixed(types) if !types.is_empty()
            && types.iter().all(|name| ["null", "boolean"].contains(&name.as_str())))
        };
        if !plain(&kind) {
            return invalid(format!(
                "tools: the bounds of {key:?} cannot be enforced: {} writes text without quotes, and it may be more \
                 than text; drop the bounds, or the other types but null and boolean",
                self.style.name
            ));
        }
        let text = self.raw(&strings, root, before, marker)?;
        let Kind::Mixed(types) = kind else {
            return Ok(format!("{head}{text} {after}"));
        };
        let mut words = Vec::new();
        for name in types {
            let all: &[&str] = if name == "null" {
                &["null"]
            } else {
                &["true", "false"]
            };
            words.extend(
                all.iter()
                    .map(|word| format!("{}{end}", self.literal(word))),
            );
        }
        Ok(format!("{head}({text} | {}) {after}", words.join("| ")))
    }

    /// A value in JSON.
    fn json(&mut self, schema: &Value, root: &Value) -> Result<String> {
        let body = self.lark.schema(&with_definitions(schema, root))?;
        Ok(self.rule("value", "", &body))
    }

    /// A string without quotes, up to and with `before` + `marker`, within the bounds that its schema sets.
    fn raw(&mut self, schema: &Value, root: &Value, before: &str, marker: &str) -> Result<String> {
        let schema = raw::resolved(schema, root);
        if let Some(branches) = raw::branches(schema) {
            let mut texts = Vec::new();
            for branch in branches {
                texts.push(self.raw(branch, root, before, marker)?);
            }
            return Ok(format!("({})", texts.join(" | ")));
        }
        let bounds = Bounds::of(schema)?;
        if bounds.is_none() {
            return Ok(self.until(before, marker));
        }
        if let Some(lost) = bounds.choices.iter().find(|text| text.contains(marker)) {
            return invalid(format!(
                "tools: the text {lost:?} cannot be written: {} ends a text with {marker:?}",
                self.style.name
            ));
        }
        let end = [before, marker].concat();
        if bounds.only_choices() {
            let choices = bounds.choices.iter();
            let choices: Vec<String> = choices
                .map(|text| self.literal(&[text, end.as_str()].concat()))
                .collect();
            return Ok(format!("({})", choices.join("| ")));
        }
        let token = self.lark.literal(marker);
        let token = is_token(&token).then_some(token);
        let (close, behind) = match token {
            Some(_) => (escape(before), "*"),
            None => (escape(&end), "+"),
        };
        let mut parts: Vec<String> = bounds
            .expressions()
            .iter()
            .map(|expression| format!("/({expression}){close}/"))
            .collect();
        parts.push(format!("~/(.|\\n)*{}(.|\\n){behind}/", escape(marker)));
        let text = self.rule("TEXT", "", &parts.join(" & "));
        Ok(format!("{text} {}", token.unwrap_or_default()))
    }

    /// Text up to and with the first `before` + `marker`.
    fn until(&mut self, before: &str, marker: &str) -> String {
        let literal = self.lark.literal(marker);
        if is_token(&literal) {
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
        let schema = raw::resolved(schema, root);
        let quote = self.literal(QUOTE);
        if Kind::of(schema, root) == Kind::Text {
            return Ok(format!("{quote}{}", self.raw(schema, root, "", QUOTE)?));
        }
        let plain = depth < DEEPEST;
        let types = schema.get("type").and_then(Value::as_array);
        let each: Vec<Value> = match (raw::branches(schema), types) {
            (Some(branches), _) => branches.clone(),
            (None, Some(types)) => types
                .iter()
                .map(|name| raw::of_type(schema, name))
                .collect(),
            _ => Vec::new(),
        };
        if plain && !each.is_empty() {
            let mut values = Vec::new();
            for schema in &each {
                values.push(self.gemma(tool, schema, depth + 1)?);
            }
            return Ok(format!("({})", values.join(" | ")));
        }
        match schema.get("type").and_then(Value::as_str) {
            Some("number" | "integer" | "boolean" | "null") => {
                let body = self.lark.schema(schema)?;
                Ok(self.rule("value", "", &body))
            }
            Some("array") if plain && schema.get("items").is_some_and(Value::is_object) => {
                let item = self.gemma(tool, &schema["items"], depth + 1)?;
                let item = self.rule("item", "", &item);
                Ok(format!("\"[\" {} \"]\"", items(&item, schema)))
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

/// Items with commas between, as many as the schema of their array asks for.
fn items(item: &str, schema: &Value) -> String {
    let count = |key: &str| schema.get(key).and_then(Value::as_u64);
    let (least, most) = (count("minItems").unwrap_or(0), count("maxItems"));
    let more = match most {
        Some(0) => return String::new(),
        Some(most) => format!("{{{},{}}}", least.saturating_sub(1), most - 1),
        None => format!("{{{},}}", least.saturating_sub(1)),
    };
    let optional = if least == 0 { "?" } else { "" };
    format!("({item} (\",\" {item}){more}){optional}")
}

/// Whether a Lark expression is one special token.
fn is_token(literal: &str) -> bool {
    literal.starts_with("<[")
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
pub(super) fn escape(text: &str) -> String {
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
