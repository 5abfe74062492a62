//! The beginning of a call: markers, the tool's name, and what stands before its arguments. It reads what is there and
//! takes nothing.

use super::NUMBER;
use super::literal::Span;
use super::parser::Parser;

/// How much of a pattern is there.
#[derive(Debug, PartialEq, Eq)]
pub(super) enum Match {
    Need,
    No,
    At(usize),
}

/// What the beginning of a call turned out to be.
pub(super) enum Head {
    Need,
    Fail,
    /// The arguments follow behind so many bytes.
    Open(String, usize),
    /// The whole object has been read, and its arguments as they stand there.
    Whole(String, Option<String>, usize),
}

impl Parser {
    /// A head outside of any object: `open` `before` name `after`.
    pub(super) fn plain_head(&self, text: &str, item: bool) -> Head {
        let whole = [self.style.open, self.style.before].concat();
        let next = [",", self.style.before].concat();
        let patterns = match item {
            true => vec![next.as_str()],
            false => vec![whole.as_str(), self.style.before],
        };
        let mut need = false;
        for pattern in patterns {
            if pattern.is_empty() {
                continue;
            }
            let at = match flexible(text, pattern) {
                Match::At(at) => at,
                Match::Need => {
                    need = true;
                    continue;
                }
                Match::No => continue,
            };
            match self.named_head(text, at) {
                Head::Need => need = true,
                Head::Fail => {}
                head => return head,
            }
        }
        if need { Head::Need } else { Head::Fail }
    }

    fn named_head(&self, text: &str, at: usize) -> Head {
        let start = at + text[at..].len() - text[at..].trim_start().len();
        let rest = &text[start..];
        let stop = |c: char| c.is_whitespace() || "<>[](){}\"'=,:`|".contains(c);
        let Some(length) = rest.find(stop) else {
            return Head::Need;
        };
        if length == 0 {
            return Head::Fail;
        }
        match flexible(&rest[length..], self.style.after.trim_end()) {
            Match::At(used) => Head::Open(rest[..length].to_string(), start + length + used),
            Match::Need => Head::Need,
            Match::No => Head::Fail,
        }
    }

    /// A head inside of an object: `open` `{"name": name, "arguments":`, in any order.
    pub(super) fn object_head(&self, text: &str, item: bool) -> Head {
        let opening = [self.style.open, self.style.before].concat();
        let opening = opening
            .split_once('{')
            .map_or(opening.as_str(), |(head, _)| head);
        let lead = self.style.lead;
        let at = match item {
            true => 1,
            false if !lead.is_empty() && text.starts_with(lead) => lead.len(),
            false => match flexible(text, opening.trim_end()) {
                Match::At(at) => at,
                Match::Need => return Head::Need,
                Match::No => return Head::Fail,
            },
        };
        self.object(text, at)
    }

    fn object(&self, text: &str, at: usize) -> Head {
        // The name comes before the arguments as a rule; where it does not, they wait for it.
        let mut cursor = Cursor { text, at };
        let (mut name, mut arguments): (Option<String>, Option<String>) = (None, None);
        match cursor.next() {
            None => return Head::Need,
            Some('{') => cursor.at += 1,
            Some(_) => return Head::Fail,
        }
        loop {
            match cursor.next() {
                None => return Head::Need,
                Some('}') => break,
                Some(',') if name.is_some() || arguments.is_some() => cursor.at += 1,
                Some('"') => {}
                Some(_) if cursor.at > 0 => return Head::Fail,
                Some(_) => {}
            }
            if cursor.next() == Some('}') {
                break;
            }
            let Some(key) = cursor.value() else {
                return Head::Need;
            };
            let Ok(key) = serde_json::from_str::<String>(key) else {
                return Head::Fail;
            };
            match cursor.next() {
                None => return Head::Need,
                Some(':') => cursor.at += 1,
                Some(_) => return Head::Fail,
            }
            let Some(first) = cursor.next() else {
                return Head::Need;
            };
            let wanted = key == "arguments" || key == "parameters";
            if wanted && first == '{' && name.is_some() && arguments.is_none() {
                return Head::Open(name.unwrap_or_default(), cursor.at);
            }
            if self.style.bare && !(wanted || ["name", "type", "id"].contains(&key.as_str())) {
                return Head::Fail;
            }
            let Some(value) = cursor.value() else {
                return Head::Need;
            };
            match key.as_str() {
                "name" | "tool_name" => match serde_json::from_str::<String>(value) {
                    Ok(text) if !text.is_empty() => name = Some(text),
                    _ => return Head::Fail,
                },
                _ if wanted => arguments = Some(value.to_string()),
                _ => {}
            }
            match cursor.next() {
                None => return Head::Need,
                Some('}') => break,
                Some(',') => cursor.at += 1,
                Some(_) => return Head::Fail,
            }
        }
        let Some(name) = name else {
            return Head::Fail;
        };
        let known = self.tools.iter().any(|(tool, _)| *tool == name);
        if self.style.bare && arguments.is_none() && !known {
            return Head::Fail;
        }
        Head::Whole(name, arguments, cursor.at + 1)
    }
}

/// Whether `text` begins with `pattern`, where white space of the pattern stands for any, or none, and [`NUMBER`] for
/// digits.
pub(super) fn flexible(text: &str, pattern: &str) -> Match {
    let mut rest = text;
    for wanted in pattern.chars() {
        if wanted == NUMBER {
            let digits = rest.len() - rest.trim_start_matches(|c: char| c.is_ascii_digit()).len();
            match rest[digits..].is_empty() {
                true => return Match::Need,
                false if digits == 0 => return Match::No,
                false => rest = &rest[digits..],
            }
            continue;
        }
        if wanted.is_whitespace() || "[{,".contains(wanted) {
            rest = rest.trim_start();
        }
        if wanted.is_whitespace() {
            continue;
        }
        match rest.chars().next() {
            None => return Match::Need,
            Some(c) if c == wanted => rest = &rest[c.len_utf8()..],
            Some(_) => return Match::No,
        }
    }
    Match::At(text.len() - rest.len())
}

/// A place in JSON text.
struct Cursor<'a> {
    text: &'a str,
    at: usize,
}

impl<'a> Cursor<'a> {
    /// The next character that is no white space, where the cursor then stands.
    fn next(&mut self) -> Option<char> {
        let rest = self.text.get(self.at..)?;
        self.at += rest.len() - rest.trim_start().len();
        self.text[self.at..].chars().next()
    }

    /// The value here, behind which the cursor then stands; none while its end is not to be seen.
    fn value(&mut self) -> Option<&'a str> {
        let rest = &self.text[self.at..];
        let end = match rest.chars().next()? {
            '"' | '{' | '[' => Span::new().whole(rest)?,
            _ => rest.find(|c: char| c.is_whitespace() || ",:}]<".contains(c))?,
        };
        self.at += end;
        Some(&rest[..end])
    }
}
