//! The arguments of a call as they come, in any style's writing, turned into pieces of one JSON object.

use super::head::{Match, flexible};
use super::literal::{Span, inner, literal, quote};
use super::parser::{LONGEST_HEAD, floor, overlap};
use super::{Arguments, Kind, QUOTE, Style, Tags};

/// Reads the arguments of one call into JSON.
#[derive(Debug)]
pub(super) struct Reader {
    form: Arguments,
    kinds: Vec<(String, Kind)>,
    stage: Stage,
    /// Arguments written so far.
    written: usize,
}

#[derive(Debug)]
enum Stage {
    /// A JSON object not yet begun, or as deep as this.
    Json(Span),
    /// The next name, or the end.
    Key,
    /// A value, the first newline of which may still be dropped.
    Value { kind: Kind, trim: bool, text: bool },
    /// A value written as a literal.
    Literal(Span),
    /// A string in Gemma's quotes.
    Quoted,
}

impl Reader {
    pub(super) fn new(style: &Style, kinds: Vec<(String, Kind)>) -> Self {
        let json = matches!(style.arguments, Arguments::Json | Arguments::Envelope);
        Self {
            form: style.arguments,
            kinds,
            stage: if json {
                Stage::Json(Span::new())
            } else {
                Stage::Key
            },
            written: 0,
        }
    }

    /// Takes what it can of `held`; true when the arguments are over.
    pub(super) fn read(&mut self, held: &mut String, out: &mut String) -> bool {
        loop {
            let done = match &mut self.stage {
                Stage::Json(_) => return self.json(held, out),
                Stage::Key => match self.key(held, out) {
                    Key::Need => return false,
                    Key::Over => {
                        out.push_str(if self.written == 0 { "{}" } else { "}" });
                        return true;
                    }
                    Key::Value => true,
                },
                Stage::Value { .. } => self.value(held, out),
                Stage::Literal(_) => self.literal(held, out),
                Stage::Quoted => self.quoted(held, out),
            };
            if !done {
                return false;
            }
        }
    }

    /// What can still be said when the text ends amid the arguments.
    pub(super) fn cut_short(&mut self, held: &str) -> String {
        match &self.stage {
            Stage::Json(_) => held.to_string(),
            Stage::Key => String::new(),
            Stage::Value { text: true, .. } | Stage::Quoted => inner(held),
            Stage::Value { .. } | Stage::Literal(_) => held.to_string(),
        }
    }

    fn json(&mut self, held: &mut String, out: &mut String) -> bool {
        let Stage::Json(span) = &mut self.stage else {
            return true;
        };
        if self.written == 0 {
            let lead = held.len() - held.trim_start().len();
            held.drain(..lead);
            match held.chars().next() {
                None => return false,
                Some('{') => self.written = 1,
                Some(_) => {
                    out.push_str("{}");
                    return true;
                }
            }
        }
        match span.whole(held) {
            Some(end) => {
                out.extend(held.drain(..end));
                true
            }
            None => {
                out.push_str(held);
                held.clear();
                span.restart();
                false
            }
        }
    }

    fn key(&mut self, held: &mut String, out: &mut String) -> Key {
        match self.form {
            Arguments::Tagged(tags) => self.tagged_key(tags, held, out),
            _ => self.word_key(held, out),
        }
    }

    fn tagged_key(&mut self, tags: Tags, held: &mut String, out: &mut String) -> Key {
        let rest = held.trim_start();
        let lead = held.len() - rest.len();
        let Some(rest) = rest.strip_prefix(tags.key.0) else {
            return match tags.key.0.starts_with(rest) {
                true => Key::Need,
                false => Key::Over,
            };
        };
        let ends = [Some(tags.key.1), tags.json];
        let stop = tags.key.1.chars().next().unwrap_or('>');
        let seen = floor(rest, LONGEST_HEAD);
        let (length, used, said) = match rest[..seen].find(stop) {
            None if seen == rest.len() => return Key::Need,
            None => return Key::Over,
            Some(length) => {
                let found = ends.map(|end| {
                    end.map_or(Match::No, |end| flexible(&rest[length..], end.trim_end()))
                });
                match found {
                    [Match::At(used), _] => (length, used, tags.json.map(|_| true)),
                    [_, Match::At(used)] => (length, used, Some(false)),
                    [Match::No, Match::No] => return Key::Over,
                    _ => return Key::Need,
                }
            }
        };
        let key = rest[..length].trim().to_string();
        held.drain(..lead + tags.key.0.len() + length + used);
        let kind = match (self.begin(&key, out), said) {
            // What a schema leaves open, the tag says.
            (Kind::Mixed(_), Some(true)) => Kind::Text,
            (Kind::Mixed(_), Some(false)) => Kind::Json,
            (kind, _) => kind,
        };
        let text = kind == Kind::Text;
        if text {
            out.push('"');
        }
        self.stage = Stage::Value {
            kind,
            trim: tags.value.0 == "\n",
            text,
        };
        Key::Value
    }

    /// `key=` or `key:`, behind a comma or not.
    fn word_key(&mut self, held: &mut String, out: &mut String) -> Key {
        let sign = if self.form == Arguments::Gemma {
            ':'
        } else {
            '='
        };
        let mut rest = held.trim_start();
        if self.written > 0
            && let Some(behind) = rest.strip_prefix(',')
        {
            rest = behind.trim_start();
        }
        let seen = floor(rest, LONGEST_HEAD);
        let stop = |c: char| c == sign || "(){}[]<,'".contains(c);
        let Some(length) = rest[..seen].find(stop) else {
            return match seen == rest.len() {
                true => Key::Need,
                false => Key::Over,
            };
        };
        let key = rest[..length].trim().trim_matches('"').to_string();
        if key.is_empty() || !rest[length..].starts_with(sign) {
            // Only a comma before the end is dropped with it.
            if rest.starts_with([')', '}']) {
                *held = rest.to_string();
            }
            return Key::Over;
        }
        let behind = rest[length + sign.len_utf8()..].trim_start();
        let gemma = self.form == Arguments::Gemma;
        if behind.is_empty() || (gemma && QUOTE.starts_with(behind) && behind != QUOTE) {
            return Key::Need;
        }
        let quoted = gemma && behind.starts_with(QUOTE);
        let behind = if quoted {
            behind[QUOTE.len()..].to_string()
        } else {
            behind.to_string()
        };
        *held = behind;
        self.begin(&key, out);
        self.stage = if quoted {
            out.push('"');
            Stage::Quoted
        } else {
            Stage::Literal(Span::new())
        };
        Key::Value
    }

    fn begin(&mut self, key: &str, out: &mut String) -> Kind {
        out.push_str(if self.written == 0 { "{" } else { ", " });
        self.written += 1;
        out.push('"');
        out.push_str(&inner(key));
        out.push_str("\": ");
        let known = self.kinds.iter().find(|(name, _)| name == key);
        known.map_or(Kind::Mixed(Vec::new()), |(_, kind)| kind.clone())
    }

    fn value(&mut self, held: &mut String, out: &mut String) -> bool {
        let (Arguments::Tagged(tags), Stage::Value { kind, trim, text }) =
            (self.form, &mut self.stage)
        else {
            return true;
        };
        let (before, close, _) = tags.value;
        if *trim && !held.is_empty() {
            *trim = false;
            if held.starts_with('\n') {
                held.drain(..1);
            }
        }
        let Some(at) = held.find(close) else {
            if *text {
                let mut sure = held.len() - overlap(held, close);
                if !before.is_empty() && held[..sure].ends_with(before) {
                    sure -= before.len();
                }
                out.push_str(&inner(&held[..sure]));
                held.drain(..sure);
            }
            return false;
        };
        let raw = held[..at].strip_suffix(before).unwrap_or(&held[..at]);
        if *text {
            out.push_str(&inner(raw));
            out.push('"');
        } else {
            out.push_str(&of_kind(raw, kind));
        }
        held.drain(..at + close.len());
        self.stage = Stage::Key;
        true
    }

    fn literal(&mut self, held: &mut String, out: &mut String) -> bool {
        let Stage::Literal(span) = &mut self.stage else {
            return true;
        };
        let close = if self.form == Arguments::Gemma {
            ",}"
        } else {
            ",)"
        };
        let Some(at) = span.end(held, close) else {
            return false;
        };
        let raw = held[..at].trim();
        match literal(raw) {
            Some(json) => out.push_str(&json),
            None => out.push_str(&quote(raw)),
        }
        held.drain(..at);
        self.stage = Stage::Key;
        true
    }

    fn quoted(&mut self, held: &mut String, out: &mut String) -> bool {
        if let Some(at) = held.find(QUOTE) {
            out.push_str(&inner(&held[..at]));
            out.push('"');
            held.drain(..at + QUOTE.len());
            self.stage = Stage::Key;
            return true;
        }
        let sure = held.len() - overlap(held, QUOTE);
        out.push_str(&inner(&held[..sure]));
        held.drain(..sure);
        false
    }
}

/// What stands where an argument's name may.
enum Key {
    Need,
    Over,
    Value,
}

/// A raw value as JSON of the kind its schema asks for, else as a string.
fn of_kind(raw: &str, kind: &Kind) -> String {
    let plain = raw.trim();
    let json = match serde_json::from_str::<serde_json::Value>(plain) {
        Ok(_) => Some(plain.to_string()),
        Err(_) if matches!(plain, "True" | "False" | "None") || *kind == Kind::Json => {
            literal(plain)
        }
        Err(_) => None,
    };
    let Some(json) = json else {
        return quote(raw);
    };
    let fits = match kind {
        Kind::Text => false,
        Kind::Json => true,
        Kind::Mixed(types) if types.is_empty() => !json.starts_with('"'),
        Kind::Mixed(types) => {
            let found = match json.as_bytes().first() {
                Some(b'{') => "object",
                Some(b'[') => "array",
                Some(b'"') => "string",
                Some(b't' | b'f') => "boolean",
                Some(b'n') => "null",
                _ => "number",
            };
            types.iter().any(|name| {
                name == found || (name == "integer" && found == "number" && !json.contains(['.']))
            })
        }
    };
    if fits { json } else { quote(raw) }
}
