//! Values written as JSON, Python or Gemma literals: where they end, and what they are in JSON.

use super::QUOTE;

/// The deepest literal that is read; a deeper one is a string.
const DEEPEST: usize = 64;

/// Finds where a value ends; it goes on where it stopped when more text has come.
#[derive(Debug)]
pub(super) struct Span {
    at: usize,
    depth: usize,
    inside: Option<Inside>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Inside {
    /// A string, closed by this byte.
    String(u8),
    /// A string, right behind a backslash.
    Escaped(u8),
    /// A string in Gemma's quotes.
    Gemma,
}

impl Span {
    pub(super) fn new() -> Self {
        Self {
            at: 0,
            depth: 0,
            inside: None,
        }
    }

    /// The text so far was taken away.
    pub(super) fn restart(&mut self) {
        self.at = 0;
    }

    /// Where a JSON string, object or array ends, that `text` begins with.
    pub(super) fn whole(&mut self, text: &str) -> Option<usize> {
        while let Some(&byte) = text.as_bytes().get(self.at) {
            self.at += 1;
            match (self.inside, byte) {
                (Some(Inside::Escaped(close)), _) => self.inside = Some(Inside::String(close)),
                (Some(Inside::String(close)), b'\\') => self.inside = Some(Inside::Escaped(close)),
                (Some(Inside::String(b'"')), b'"') => {
                    self.inside = None;
                    if self.depth == 0 {
                        return Some(self.at);
                    }
                }
                (Some(_), _) => {}
                (None, b'"') => self.inside = Some(Inside::String(b'"')),
                (None, b'{' | b'[') => self.depth += 1,
                (None, b'}' | b']') => {
                    self.depth = self.depth.saturating_sub(1);
                    if self.depth == 0 {
                        return Some(self.at);
                    }
                }
                (None, _) => {}
            }
        }
        None
    }

    /// Where one of the bytes of `close` stands outside of all quotes and brackets.
    pub(super) fn end(&mut self, text: &str, close: &str) -> Option<usize> {
        while let Some(&byte) = text.as_bytes().get(self.at) {
            if byte == b'<' && matches!(self.inside, None | Some(Inside::Gemma)) {
                let rest = &text.as_bytes()[self.at..];
                if rest.starts_with(QUOTE.as_bytes()) {
                    self.inside = match self.inside {
                        None => Some(Inside::Gemma),
                        _ => None,
                    };
                    self.at += QUOTE.len();
                    continue;
                }
                if QUOTE.as_bytes().starts_with(rest) {
                    return None;
                }
            }
            match self.inside {
                Some(Inside::Escaped(quote)) => self.inside = Some(Inside::String(quote)),
                Some(Inside::String(_)) if byte == b'\\' => {
                    if let Some(Inside::String(quote)) = self.inside {
                        self.inside = Some(Inside::Escaped(quote));
                    }
                }
                Some(Inside::String(quote)) if byte == quote => self.inside = None,
                Some(_) => {}
                None if self.depth == 0 && close.as_bytes().contains(&byte) => {
                    return Some(self.at);
                }
                None => match byte {
                    b'"' | b'\'' => self.inside = Some(Inside::String(byte)),
                    b'{' | b'[' | b'(' => self.depth += 1,
                    b'}' | b']' | b')' => self.depth = self.depth.saturating_sub(1),
                    _ => {}
                },
            }
            self.at += 1;
        }
        None
    }
}

/// A literal as JSON; none if it is none.
pub(super) fn literal(text: &str) -> Option<String> {
    let mut reader = Literal { rest: text.trim() };
    let mut json = String::new();
    reader.value(&mut json, 0)?;
    reader.rest.trim().is_empty().then_some(json)
}

struct Literal<'a> {
    rest: &'a str,
}

impl Literal<'_> {
    fn value(&mut self, json: &mut String, depth: usize) -> Option<()> {
        if depth > DEEPEST {
            return None;
        }
        self.rest = self.rest.trim_start();
        match self.rest.chars().next()? {
            '"' | '\'' => json.push_str(&quote(&self.string()?)),
            '<' => json.push_str(&quote(&self.gemma()?)),
            '[' => self.items(json, ']', depth)?,
            '(' => self.items(json, ')', depth)?,
            '{' => self.members(json, depth)?,
            _ => {
                let end = self
                    .rest
                    .find(|c: char| c.is_whitespace() || ",:]})".contains(c));
                let (word, rest) = self.rest.split_at(end.unwrap_or(self.rest.len()));
                self.rest = rest;
                json.push_str(match word {
                    "true" | "True" => "true",
                    "false" | "False" => "false",
                    "null" | "None" => "null",
                    number => {
                        serde_json::from_str::<serde_json::Number>(number).ok()?;
                        number
                    }
                });
            }
        }
        Some(())
    }

    /// Whether `c` comes next, which is then taken.
    fn takes(&mut self, c: char) -> bool {
        self.rest = self.rest.trim_start();
        match self.rest.strip_prefix(c) {
            Some(rest) => {
                self.rest = rest;
                true
            }
            None => false,
        }
    }

    fn items(&mut self, json: &mut String, close: char, depth: usize) -> Option<()> {
        self.rest = &self.rest[1..];
        json.push('[');
        let mut first = true;
        while !self.takes(close) {
            if !first {
                json.push_str(", ");
            }
            first = false;
            self.value(json, depth + 1)?;
            if !self.takes(',') {
                if self.takes(close) {
                    break;
                }
                return None;
            }
        }
        json.push(']');
        Some(())
    }

    fn members(&mut self, json: &mut String, depth: usize) -> Option<()> {
        self.rest = &self.rest[1..];
        json.push('{');
        let mut first = true;
        while !self.takes('}') {
            if !first {
                json.push_str(", ");
            }
            first = false;
            let key = match self.rest.chars().next()? {
                '"' | '\'' => self.string()?,
                '<' => self.gemma()?,
                _ => {
                    let (key, _) = self.rest.split_once(':')?;
                    self.rest = &self.rest[key.len()..];
                    key.trim().to_string()
                }
            };
            if !self.takes(':') {
                return None;
            }
            json.push_str(&quote(&key));
            json.push_str(": ");
            self.value(json, depth + 1)?;
            if !self.takes(',') {
                if self.takes('}') {
                    break;
                }
                return None;
            }
        }
        json.push('}');
        Some(())
    }

    fn gemma(&mut self) -> Option<String> {
        let rest = self.rest.strip_prefix(QUOTE)?;
        let (text, rest) = rest.split_once(QUOTE)?;
        self.rest = rest;
        Some(text.to_string())
    }

    fn string(&mut self) -> Option<String> {
        let mut chars = self.rest.chars();
        let close = chars.next()?;
        let mut text = String::new();
        loop {
            let c = match chars.next()? {
                c if c == close => break,
                '\\' => match chars.next()? {
                    'n' => '\n',
                    't' => '\t',
                    'r' => '\r',
                    'b' => '\u{8}',
                    'f' => '\u{c}',
                    'u' => unicode(&mut chars)?,
                    other => other,
                },
                c => c,
            };
            text.push(c);
        }
        self.rest = chars.as_str();
        Some(text)
    }
}

/// The character of `\uXXXX`, or of two of them that belong together.
fn unicode(chars: &mut std::str::Chars<'_>) -> Option<char> {
    let four = |chars: &mut std::str::Chars<'_>| -> Option<u32> {
        (0..4).try_fold(0, |number, _| {
            Some(number * 16 + chars.next()?.to_digit(16)?)
        })
    };
    let high = four(chars)?;
    if !(0xD800..0xDC00).contains(&high) {
        return char::from_u32(high);
    }
    if chars.next()? != '\\' || chars.next()? != 'u' {
        return None;
    }
    let low = four(chars)?
        .checked_sub(0xDC00)
        .filter(|low| *low < 0x400)?;
    char::from_u32(0x10000 + ((high - 0xD800) << 10) + low)
}

/// A JSON string.
pub(super) fn quote(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}

/// A JSON string without its quotes.
pub(super) fn inner(text: &str) -> String {
    let quoted = quote(text);
    quoted[1..quoted.len() - 1].to_string()
}
