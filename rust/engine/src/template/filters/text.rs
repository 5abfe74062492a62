//! Filters that make text of text.

use super::super::format;
use super::super::methods;
use super::super::origin::{Str, Text};
use super::super::run::{CallArgs, Run};
use super::super::text;
use super::super::value::{Budget, Res, Value, fault, html_escape};

pub(super) fn filter(run: &mut Run<'_>, name: &str, value: &Value, args: CallArgs) -> Res<Value> {
    let budget = &mut run.budget;
    match (name, value) {
        ("indent" | "wordwrap", Value::Undefined(missing)) => return missing.fault(),
        ("indent" | "wordwrap", Value::Str(_)) | ("truncate", Value::Str(_)) => {}
        ("indent" | "wordwrap", other) => {
            let owner = other.type_name();
            return fault(format!("'{owner}' object has no attribute 'splitlines'"));
        }
        ("truncate", other) => return truncate_other(other, args, budget),
        _ => {}
    }
    let s = value.to_str(budget)?;
    budget.bytes(s.text.len())?;
    let same = |text: String| Ok(Value::Str(s.made_into(text)));
    match name {
        "trim" => {
            let [chars] = args.bind(name, ["chars"])?;
            let chars = match chars {
                None | Some(Value::None) => None,
                Some(chars) => Some(chars.to_text(budget)?),
            };
            let left = methods::stripped(&s.text, "strip", chars.as_deref());
            Ok(Value::Str(s.slice(left)))
        }
        "upper" => same(s.text.to_uppercase()),
        "lower" => same(s.text.to_lowercase()),
        "capitalize" => same(text::capitalize(&s.text)),
        "title" => same(title(&s.text)),
        "replace" => {
            let [old, new, count] = args.bind(name, ["old", "new", "count"])?;
            let (Some(old), Some(new)) = (old, new) else {
                return fault("replace needs old and new");
            };
            replace(run, s, &old, &new, count)
        }
        "indent" => indent(&s, args, budget),
        "format" => match (args.named.is_empty(), args.positional.is_empty()) {
            (false, false) => {
                fault("can't handle positional and keyword arguments at the same time")
            }
            (false, true) => {
                let named = args.named.into_iter();
                let pairs = named.map(|(k, v)| (Str::from(k).into(), v)).collect();
                let named = Value::dict(pairs, budget)?;
                format::percent(&s, &named, budget)
            }
            (true, _) => {
                let values = Value::tuple(args.positional, budget)?;
                format::percent(&s, &values, budget)
            }
        },
        "truncate" => truncate(&s, args, budget),
        "wordcount" => {
            let word = |c: char| c == '_' || c.is_alphanumeric();
            Ok(Value::int(
                s.text.split(|c| !word(c)).filter(|w| !w.is_empty()).count(),
            ))
        }
        "wordwrap" => same(word_wrap(&s.text, args, budget)?),
        _ => {
            let [width] = args.bind(name, ["width"])?;
            let args = CallArgs {
                positional: vec![width.unwrap_or(Value::Int(80))],
                named: Vec::new(),
            };
            methods::pad(&s, "center", args, budget)
        }
    }
}

/// The title filter: words begin after white space, a hyphen or an opening bracket.
fn title(t: &str) -> String {
    let mut out = String::with_capacity(t.len());
    let mut start = true;
    for c in t.chars() {
        let between = c == '-' || text::is_space(c) || matches!(c, '(' | '{' | '[' | '<');
        match start && !between {
            true => out.extend(c.to_uppercase()),
            false => out.extend(c.to_lowercase()),
        }
        start = between;
    }
    out
}

/// The replace filter: HTML in its arguments counts where escaping is on.
fn replace(
    run: &mut Run<'_>,
    s: Str,
    old: &Value,
    new: &Value,
    count: Option<Value>,
) -> Res<Value> {
    let budget = &mut run.budget;
    let (old, new) = (old.to_str(budget)?, new.to_str(budget)?);
    let count = count.filter(|n| !matches!(n, Value::None));
    let plain = Str {
        markup: s.markup && run.autoescape,
        ..s
    };
    methods::replace(&plain, &old, &new, count.as_ref(), budget)
}

fn indent(s: &Str, args: CallArgs, budget: &mut Budget) -> Res<Value> {
    let [width, first, blank] = args.bind("indent", ["width", "first", "blank"])?;
    let by = match width {
        None => Str::from("    "),
        Some(Value::Str(by)) => by,
        Some(other) => match other.as_int() {
            Some(n) => {
                let n = usize::try_from(n.max(0)).unwrap_or(usize::MAX);
                budget.bytes(n)?;
                Str::from(&*" ".repeat(n))
            }
            None => return fault("can't multiply sequence by non-int"),
        },
    };
    let truth = |flag: Option<Value>| flag.is_some_and(|f| f.truth());
    let (first, blank) = (truth(first), truth(blank));
    let with_newline = s.made_into(format!("{}\n", s.text));
    let mut out = Text::default();
    for (i, line) in text::lines(&with_newline.text, false)
        .into_iter()
        .enumerate()
    {
        budget.bytes(by.text.len() + line.len() + 1)?;
        if i > 0 {
            out.own("\n");
        }
        if (i == 0 && first) || (i > 0 && (blank || !line.is_empty())) {
            out.str(&by);
        }
        out.made(line, &with_newline.origin);
    }
    Ok(Value::Str(out.finish(s.markup)))
}

/// What has a length that is short enough stays; anything else cannot be cut.
fn truncate_other(value: &Value, args: CallArgs, budget: &mut Budget) -> Res<Value> {
    let len = value.len(budget)?;
    let [length, _, _, leeway] = args.bind("truncate", ["length", "killwords", "end", "leeway"])?;
    let size = |v: Option<Value>, default: i128| v.and_then(|v| v.as_int()).unwrap_or(default);
    match len as i128 <= size(length, 255).saturating_add(size(leeway, 5)) {
        true => Ok(value.clone()),
        false => fault(format!("'{}' cannot be cut", value.type_name())),
    }
}

fn truncate(s: &Str, args: CallArgs, budget: &mut Budget) -> Res<Value> {
    let [length, kill, end, leeway] =
        args.bind("truncate", ["length", "killwords", "end", "leeway"])?;
    let size = |v: Option<Value>, default: usize| {
        v.and_then(|v| v.as_int())
            .and_then(|i| usize::try_from(i).ok())
            .unwrap_or(default)
    };
    let (length, leeway) = (size(length, 255), size(leeway, 5));
    let end = end.unwrap_or_else(|| Value::from("...")).to_str(budget)?;
    let end_chars = end.text.chars().count();
    if length < end_chars {
        return fault(format!("expected length >= {end_chars}, got {length}"));
    }
    if s.text.chars().count() <= length.saturating_add(leeway) {
        return Ok(Value::Str(s.clone()));
    }
    let cut = s.text.char_indices().nth(length - end_chars);
    let cut = &s.text[..cut.map_or(s.text.len(), |(at, _)| at)];
    let kept = match kill.is_some_and(|k| k.truth()) {
        true => cut,
        false => cut.rsplit_once(' ').map_or(cut, |(head, _)| head),
    };
    let mut out = Text::default();
    out.part(s, 0..kept.len());
    match s.markup && !end.markup {
        true => out.made(&html_escape(&end.text), &end.origin),
        false => out.str(&end),
    }
    Ok(Value::Str(out.finish(s.markup)))
}

fn word_wrap(t: &str, args: CallArgs, budget: &mut Budget) -> Res<String> {
    let names = [
        "width",
        "break_long_words",
        "wrapstring",
        "break_on_hyphens",
    ];
    let [width, break_long, with, hyphens] = args.bind("wordwrap", names)?;
    let width = match width.map(|w| w.as_int()) {
        None => 79,
        Some(Some(width)) if width > 0 => usize::try_from(width).unwrap_or(usize::MAX),
        _ => return fault("invalid width (must be > 0)"),
    };
    let truth = |flag: Option<Value>| flag.is_none_or(|f| f.truth());
    let (break_long, hyphens) = (truth(break_long), truth(hyphens));
    let with = with.unwrap_or_else(|| Value::from("\n")).to_text(budget)?;
    let with = if with.is_empty() { "\n" } else { &*with };
    let mut paragraphs = Vec::new();
    for line in text::lines(t, false) {
        budget.bytes(8 * line.len())?;
        let lines = wrap(line, width, break_long, hyphens);
        budget.bytes(lines.len() * (with.len() + width.min(line.len())))?;
        paragraphs.push(lines.join(with));
    }
    Ok(paragraphs.join(with))
}

/// Python's textwrap.wrap of one line.
fn wrap(line: &str, width: usize, break_long: bool, hyphens: bool) -> Vec<String> {
    let chars: Vec<char> = line.chars().collect();
    let mut chunks: Vec<&[char]> = wrap_chunks(&chars, hyphens);
    chunks.reverse();
    let blank = |chunk: &[char]| chunk.iter().all(|c| text::is_space(*c));
    let mut lines: Vec<String> = Vec::new();
    while let Some(next) = chunks.last() {
        if blank(next) && !lines.is_empty() {
            chunks.pop();
        }
        let mut current: Vec<&[char]> = Vec::new();
        let mut length = 0;
        while let Some(chunk) = chunks.pop_if(|chunk| length + chunk.len() <= width) {
            length += chunk.len();
            current.push(chunk);
        }
        if let Some(long) = chunks.pop_if(|chunk| chunk.len() > width) {
            if break_long {
                let (head, tail) = long.split_at(break_at(long, width - length, hyphens));
                current.push(head);
                chunks.push(tail);
            } else if current.is_empty() {
                current.push(long);
            } else {
                chunks.push(long);
            }
        }
        if current.last().is_some_and(|chunk| blank(chunk)) {
            current.pop();
        }
        if !current.is_empty() {
            lines.push(current.concat().into_iter().collect());
        }
    }
    lines
}

/// Where a word that is too long is cut: behind a hyphen, if one is there.
fn break_at(word: &[char], room: usize, hyphens: bool) -> usize {
    let found = word[..room]
        .iter()
        .rposition(|c| *c == '-')
        .filter(|_| hyphens);
    match found {
        Some(at) if at > 0 && word[..at].iter().any(|c| *c != '-') => at + 1,
        _ => room,
    }
}

/// White space, words, parts of words that end with a hyphen, dashes between words.
fn wrap_chunks(chars: &[char], hyphens: bool) -> Vec<&[char]> {
    let is_space = |c: char| matches!(c, '\t'..='\r' | ' ');
    let mut chunks = Vec::new();
    let mut start = 0;
    while start < chars.len() {
        let run = |wanted: bool| {
            let same = chars[start..]
                .iter()
                .take_while(|c| is_space(**c) == wanted);
            start + same.count()
        };
        let end = match is_space(chars[start]) {
            true => run(true),
            false if hyphens => word_end(chars, start, is_space),
            false => run(false),
        };
        chunks.push(&chars[start..end]);
        start = end;
    }
    chunks
}

/// The end of the word, part of a word or dash that begins here.
fn word_end(chars: &[char], start: usize, is_space: impl Fn(char) -> bool) -> usize {
    let at = |i: usize| chars.get(i).copied();
    let word = |c: Option<char>| c.is_some_and(|c| c == '_' || c.is_alphanumeric());
    let letter = |c: Option<char>| word(c) && c.is_none_or(|c| text::decimal(c).is_none());
    let before_dash = |c: char| word(Some(c)) || "!\"'&.,?".contains(c);
    // Two hyphens or more between a word before and one after.
    let dash = |i: usize| -> Option<usize> {
        let count = chars[i..].iter().take_while(|c| **c == '-').count();
        let between = i > 0 && before_dash(chars[i - 1]) && word(at(i + count));
        (count >= 2 && between).then_some(i + count)
    };
    if let Some(end) = dash(start) {
        return end;
    }
    for (end, c) in chars.iter().enumerate().skip(start + 1) {
        if is_space(*c) || dash(end).is_some() {
            return end;
        }
        let back = |n: usize| end.checked_sub(n).and_then(at);
        let behind =
            letter(back(1)) && (letter(back(2)) || back(2) == Some('-') && letter(back(3)));
        let ahead = letter(at(end + 1))
            && (letter(at(end + 2)) || at(end + 2) == Some('-') && letter(at(end + 3)));
        if *c == '-' && behind && ahead {
            return end + 1;
        }
    }
    chars.len()
}
