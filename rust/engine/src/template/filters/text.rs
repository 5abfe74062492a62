//! Filters that make text of text.

use super::super::format;
use super::super::methods;
use super::super::origin::{Str, Text};
use super::super::run::{CallArgs, Run};
use super::super::text;
use super::super::value::{Budget, Res, Value, fault, html_escape};

pub(super) fn filter(run: &mut Run<'_>, name: &str, value: &Value, args: CallArgs) -> Res<Value> {
    let budget = &mut run.budget;
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
    let [width, break_long, with, _] = args.bind(
        "wordwrap",
        [
            "width",
            "break_long_words",
            "wrapstring",
            "break_on_hyphens",
        ],
    )?;
    let width = width
        .and_then(|w| w.as_int())
        .and_then(|w| usize::try_from(w).ok())
        .unwrap_or(79)
        .max(1);
    let break_long = break_long.is_none_or(|b| b.truth());
    let with = with.unwrap_or_else(|| Value::from("\n")).to_text(budget)?;
    let mut lines: Vec<String> = Vec::new();
    for paragraph in text::lines(t, false) {
        let mut line = String::new();
        for word in paragraph.split(' ') {
            let (held, needed) = (line.chars().count(), word.chars().count());
            if !line.is_empty() && held + 1 + needed > width {
                lines.push(std::mem::take(&mut line));
            } else if !line.is_empty() {
                line.push(' ');
            }
            line.push_str(word);
            while break_long && line.chars().count() > width {
                let rest: String = line.chars().skip(width).collect();
                lines.push(line.chars().take(width).collect());
                budget.bytes(line.len())?;
                line = rest;
            }
        }
        lines.push(line);
    }
    budget.bytes(t.len() + lines.len().saturating_mul(with.len()))?;
    Ok(lines.join(&with))
}
