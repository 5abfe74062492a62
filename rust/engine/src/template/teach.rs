//! Template text -> text that minijinja's parser reads as Jinja2 would read the original.
//!
//! Syntax of Jinja2 as transformers sets it up that minijinja lacks is taught on the level of tokens:
//! the `generation` tag, for one, reads as a block of a filter that does not exist otherwise.

use std::ops::Range;

use minijinja::machinery::{Span, Token, Tokenizer};
use minijinja::syntax::SyntaxConfig;

use super::value::{Res, fault};

/// Bounds on what the parser recurses over and on trees it builds: tokens in one tag, minus signs
/// and `not`s in one tag, `elif`s in one template.
const MAX_TAG_TOKENS: usize = 4000;
const MAX_PREFIXES: usize = 100;
const MAX_ELIFS: usize = 400;

pub(super) fn syntax() -> Res<SyntaxConfig> {
    let built = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    built.or_else(|error| fault(error.to_string()))
}

/// Walk the tokens once: refuse what the parser would recurse too deep over, and say in words the
/// parser knows what it lacks: `generation` tags, unary plus, Python's escapes in strings, tuples
/// without parentheses. Lines stay where they are.
pub(super) fn teach(source: &str, config: &SyntaxConfig) -> Res<String> {
    let mut lesson = Lesson::default();
    let mut tokenizer = Tokenizer::new(source, "", false, config.clone());
    // The parser reports lexing errors itself, with their place.
    while let Ok(Some((token, span))) = tokenizer.next_token() {
        lesson.limits.see(&token, span)?;
        let range = span.start_offset as usize..span.end_offset as usize;
        lesson.see(source, &token, range, span)?;
    }
    lesson
        .changes
        .sort_by_key(|(range, _)| (range.start, range.end));
    let mut out = String::with_capacity(source.len());
    let mut copied = 0;
    for (range, with) in lesson.changes {
        out.push_str(source.get(copied..range.start).unwrap_or_default());
        out.push_str(&with);
        copied = range.end;
    }
    out.push_str(source.get(copied..).unwrap_or_default());
    Ok(out)
}

/// What was seen so far, and what has to be changed.
#[derive(Default)]
struct Lesson {
    limits: Limits,
    place: Place,
    /// Loops and generation blocks: is it a loop?
    open: Vec<bool>,
    /// Brackets that are open in this tag, and whether each is a subscript.
    brackets: Vec<Bracket>,
    /// Where an expression began that may be a tuple without parentheses; was there a comma?
    bare: Option<Bare>,
    changes: Vec<(Range<usize>, String)>,
}

struct Bracket {
    subscript: bool,
    start: usize,
    comma: bool,
}

#[derive(Clone, Copy)]
struct Bare {
    start: usize,
    comma: bool,
    /// A loop's: it begins behind `in` and ends before `if`.
    is_loop: bool,
}

impl Lesson {
    fn see(&mut self, source: &str, token: &Token<'_>, range: Range<usize>, span: Span) -> Res<()> {
        let replacement = match token {
            Token::Ident(word) if self.place == Place::Tag => {
                check_loop_control(word, &mut self.open, span)?;
                match *word {
                    "generation" => Some("filter generation".to_owned()),
                    "endgeneration" => Some("endfilter".to_owned()),
                    _ => None,
                }
            }
            // +x is -(-x): an error for all but numbers, and an int for a bool.
            Token::Plus if self.place == Place::Operand => Some("- -".to_owned()),
            Token::Ident("is") if self.place == Place::Filtered && self.limits.in_test => {
                return fault("You cannot chain multiple tests with is");
            }
            // Jinja2 takes this `if` for the test's argument, and cannot go on behind it.
            Token::Ident("if") if self.place == Place::Filtered && self.limits.in_test => {
                return fault("expected the end of the tag behind a test, got 'if'");
            }
            // The dot belongs to the filter's name: there is none of such a name.
            Token::Dot if self.place == Place::Filtered => Some("_".to_owned()),
            Token::String(_) => source.get(range.clone()).map(python_literal).transpose()?,
            _ => None,
        };
        if let Some(replacement) = replacement {
            self.changes.push((range.clone(), replacement));
        }
        match token {
            Token::Ident("is") => self.limits.in_test = true,
            Token::Pipe => self.limits.in_test = false,
            _ => {}
        }
        self.see_tuple(token, range);
        self.place = Place::after(token, &self.place);
        Ok(())
    }

    /// Parentheses around tuples that have none.
    fn see_tuple(&mut self, token: &Token<'_>, range: Range<usize>) {
        match token {
            Token::VariableStart => {
                self.brackets.clear();
                self.bare = Some(Bare {
                    start: range.end,
                    comma: false,
                    is_loop: false,
                });
            }
            Token::BlockStart => {
                self.brackets.clear();
                self.bare = None;
            }
            Token::Ident("if" | "elif") if self.place == Place::Tag => {
                self.bare = Some(Bare {
                    start: range.end,
                    comma: false,
                    is_loop: false,
                });
            }
            Token::Ident("for") if self.place == Place::Tag => self.limits.in_for = true,
            Token::Ident("in") if self.limits.in_for && self.brackets.is_empty() => {
                self.limits.in_for = false;
                self.bare = Some(Bare {
                    start: range.end,
                    comma: false,
                    is_loop: true,
                });
            }
            Token::Ident("if" | "recursive")
                if self.brackets.is_empty() && self.bare.is_some_and(|bare| bare.is_loop) =>
            {
                self.close_bare(range.start);
            }
            Token::VariableEnd | Token::BlockEnd => {
                self.close_bare(range.start);
                self.limits.in_for = false;
            }
            Token::ParenOpen | Token::BraceOpen | Token::BracketOpen => {
                let subscript = matches!(token, Token::BracketOpen)
                    && matches!(self.place, Place::Operator | Place::Filtered);
                self.brackets.push(Bracket {
                    subscript,
                    start: range.end,
                    comma: false,
                });
            }
            Token::ParenClose | Token::BraceClose | Token::BracketClose => {
                let closed = self.brackets.pop();
                if let Some(bracket) = closed.filter(|b| b.subscript && b.comma) {
                    self.wrap(bracket.start, range.start);
                }
            }
            Token::Comma => match (self.brackets.last_mut(), &mut self.bare) {
                (Some(bracket), _) => bracket.comma = true,
                (None, Some(bare)) => bare.comma = true,
                (None, None) => {}
            },
            _ => {}
        }
    }

    fn close_bare(&mut self, end: usize) {
        if let Some(bare) = self.bare.take().filter(|bare| bare.comma) {
            self.wrap(bare.start, end);
        }
    }

    fn wrap(&mut self, start: usize, end: usize) {
        self.changes.push((start..start, "(".into()));
        self.changes.push((end..end, ")".into()));
    }
}

/// What can stand next.
#[derive(PartialEq, Default)]
enum Place {
    #[default]
    Text,
    /// The name of a tag.
    Tag,
    /// An operand: a sign here is a prefix.
    Operand,
    /// An operator.
    Operator,
    /// An attribute's name.
    Name,
    /// A filter's or a test's name; what follows it.
    Filter,
    Filtered,
}

impl Place {
    fn after(token: &Token<'_>, before: &Place) -> Place {
        match token {
            Token::BlockStart => Place::Tag,
            // A name behind a dot is no word of the language.
            Token::Ident(_) if *before == Place::Name => Place::Operator,
            Token::Ident("not") if *before == Place::Filter => Place::Filter,
            Token::Ident(_) if *before == Place::Filter => Place::Filtered,
            Token::Pipe | Token::Ident("is") => Place::Filter,
            Token::Dot if *before == Place::Filtered => Place::Filter,
            Token::Dot => Place::Name,
            Token::TemplateData(_) | Token::BlockEnd | Token::VariableEnd => Place::Text,
            Token::Ident("if" | "elif" | "else" | "in" | "and" | "or" | "not") => Place::Operand,
            Token::Ident(_)
            | Token::Str(_)
            | Token::String(_)
            | Token::Int(_)
            | Token::Int128(_) => Place::Operator,
            Token::Float(_) | Token::ParenClose | Token::BracketClose | Token::BraceClose => {
                Place::Operator
            }
            _ => Place::Operand,
        }
    }
}

/// A string literal with escapes, written so that the parser reads what Python's `unicode-escape`
/// would: it knows no \a, \v, \U and joined lines, and reads \/ without its backslash.
fn python_literal(literal: &str) -> Res<String> {
    let mut out = String::with_capacity(literal.len());
    let mut chars = literal.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('a') => out.push('\u{7}'),
            Some('v') => out.push('\u{b}'),
            Some('/') => out.push_str("\\\\/"),
            // A joined line: the newline must stay for the count of lines, so it moves out of the text.
            Some('\n') => {
                let quote = literal.chars().next().unwrap_or('"');
                out.extend([quote, '\n', quote]);
            }
            Some('U') => {
                let digits = chars.as_str().get(..8);
                match digits
                    .and_then(|d| u32::from_str_radix(d, 16).ok())
                    .and_then(char::from_u32)
                {
                    Some(c) => {
                        push_literal(c, &mut out);
                        chars.nth(7);
                    }
                    None => out.push_str("\\U"),
                }
            }
            Some('N') => {
                let name = chars
                    .as_str()
                    .strip_prefix('{')
                    .and_then(|r| r.split_once('}'));
                let found = name.and_then(|(name, _)| super::text::by_name(name));
                let (Some((name, _)), Some(c)) = (name, found) else {
                    return fault("\\N in a string wants the name of a character in braces");
                };
                push_literal(c, &mut out);
                chars.nth(name.chars().count() + 1);
            }
            Some(other) => out.extend(['\\', other]),
            None => out.push('\\'),
        }
    }
    Ok(out)
}

/// A character, as it can stand in a literal.
fn push_literal(c: char, out: &mut String) {
    match c {
        '\n' => out.push_str("\\n"),
        '\\' | '"' | '\'' => out.extend(['\\', c]),
        c => out.push(c),
    }
}

/// `continue` inside a generation block would leave a function in Jinja2: a syntax error.
fn check_loop_control(word: &str, open: &mut Vec<bool>, span: Span) -> Res<()> {
    match word {
        "for" => open.push(true),
        "generation" => open.push(false),
        "endfor" | "endgeneration" => {
            open.pop();
        }
        "continue" | "break" if open.last() == Some(&false) => {
            let message = format!("'{word}' not properly in loop");
            return Err(Box::new(super::value::Fault {
                message,
                thrown: false,
                line: Some(span.start_line.into()),
            }));
        }
        _ => {}
    }
    Ok(())
}

#[derive(Default)]
struct Limits {
    tokens: usize,
    prefixes: usize,
    elifs: usize,
    /// Between a loop's `for` and its `in`.
    in_for: bool,
    /// The name before was a test's, not a filter's.
    in_test: bool,
}

impl Limits {
    fn see(&mut self, token: &Token<'_>, span: Span) -> Res<()> {
        match token {
            Token::BlockStart | Token::VariableStart => (self.tokens, self.prefixes) = (0, 0),
            Token::Minus | Token::Ident("not") => self.prefixes += 1,
            Token::Ident("elif") => self.elifs += 1,
            _ => {}
        }
        self.tokens += 1;
        let over = [
            (self.tokens, MAX_TAG_TOKENS, "tokens in a tag"),
            (self.prefixes, MAX_PREFIXES, "prefix operators in a tag"),
            (self.elifs, MAX_ELIFS, "elif tags"),
        ];
        match over.into_iter().find(|(n, limit, _)| n > limit) {
            None => Ok(()),
            Some((_, limit, what)) => Err(Box::new(super::value::Fault {
                message: format!("more than {limit} {what}"),
                thrown: false,
                line: Some(span.start_line.into()),
            })),
        }
    }
}
