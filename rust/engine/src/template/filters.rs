//! Jinja2's filters, tests and globals, with transformers' own in their place.

use std::cmp::Ordering;
use std::sync::Arc;

use super::clock::Now;
use super::format::{self, Json};
use super::methods;
use super::run::{CallArgs, MAX_RANGE, Run, compare, thrown};
use super::syntax::{Comparison, Op};
use super::text;
use super::value::{Budget, Range, Res, Str, Value, fault, html_escape};

/// The functions a template can name.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) enum Builtin {
    RaiseException,
    StrftimeNow,
    Range,
    Dict,
    Namespace,
    Cycler,
    Joiner,
    Lipsum,
}

impl Builtin {
    pub fn named(name: &str) -> Option<Builtin> {
        Some(match name {
            "raise_exception" => Builtin::RaiseException,
            "strftime_now" => Builtin::StrftimeNow,
            "range" => Builtin::Range,
            "dict" => Builtin::Dict,
            "namespace" => Builtin::Namespace,
            "cycler" => Builtin::Cycler,
            "joiner" => Builtin::Joiner,
            "lipsum" => Builtin::Lipsum,
            _ => return None,
        })
    }
}

// --- globals ---

pub(super) fn call(run: &mut Run<'_>, builtin: Builtin, args: CallArgs) -> Res<Value> {
    match builtin {
        Builtin::RaiseException => {
            let [message] = args.bind("raise_exception", ["message"])?;
            let Some(message) = message else {
                return fault(
                    "raise_exception() missing 1 required positional argument: 'message'",
                );
            };
            let message = message.to_text(&mut run.budget)?;
            Err(thrown(message.to_string()))
        }
        Builtin::StrftimeNow => {
            let [format] = args.bind("strftime_now", ["format"])?;
            let Some(Value::Str(format)) = format else {
                return fault("strftime() argument 1 must be str");
            };
            run.budget.bytes(format.text.len() * 16)?;
            let now = run.now.unwrap_or_else(Now::local);
            Ok(Value::from(now.strftime(&format.text)))
        }
        Builtin::Range => range(args),
        Builtin::Dict => {
            let pairs = dict_pairs(args, &mut run.budget)?;
            Value::dict(pairs, &mut run.budget)
        }
        Builtin::Namespace => {
            let pairs = dict_pairs(args, &mut run.budget)?;
            run.budget.bytes(64)?;
            run.namespaces.push(Vec::new());
            let id = run.namespaces.len() - 1;
            for (key, value) in pairs {
                let Value::Str(key) = key else {
                    return fault("namespace keys must be strings");
                };
                run.set_namespace(id, &key.text, value)?;
            }
            Ok(Value::Namespace(id))
        }
        Builtin::Cycler if args.positional.is_empty() => {
            fault("at least one item has to be provided")
        }
        Builtin::Cycler => Ok(Value::Cycler(Value::counter(
            args.positional,
            &mut run.budget,
        )?)),
        Builtin::Joiner => {
            let [separator] = args.bind("joiner", ["sep"])?;
            Ok(Value::Joiner(Value::counter(
                vec![separator.unwrap_or_else(|| Value::from(", "))],
                &mut run.budget,
            )?))
        }
        Builtin::Lipsum => fault("lipsum() makes random text: it is not supported"),
    }
}

fn range(args: CallArgs) -> Res<Value> {
    let [a, b, c] = args.bind("range", ["start", "stop", "step"])?;
    let int = |value: Option<Value>, default: i64| match value {
        None => Ok(default),
        Some(v) => match v.as_int().map(i64::try_from) {
            Some(Ok(i)) => Ok(i),
            _ => fault(format!(
                "'{}' object cannot be interpreted as an integer",
                v.type_name()
            )),
        },
    };
    let range = match (a, b) {
        (None, _) => return fault("range expected at least 1 argument, got 0"),
        (stop, None) => Range {
            start: 0,
            stop: int(stop, 0)?,
            step: 1,
        },
        (start, stop) => Range {
            start: int(start, 0)?,
            stop: int(stop, 0)?,
            step: int(c, 1)?,
        },
    };
    if range.step == 0 {
        return fault("range() arg 3 must not be zero");
    }
    if range.len() > MAX_RANGE {
        return fault(format!(
            "Range too big. The sandbox blocks ranges larger than MAX_RANGE ({MAX_RANGE})."
        ));
    }
    Ok(Value::Range(Arc::new(range)))
}

/// dict(mapping or pairs, **named)
fn dict_pairs(mut args: CallArgs, budget: &mut Budget) -> Res<Vec<(Value, Value)>> {
    let mut pairs = Vec::new();
    match (args.positional.pop(), args.positional.len()) {
        (None, _) => {}
        (Some(Value::Dict(d)), 0) => pairs.extend(d.entries.iter().cloned()),
        (Some(other), 0) => {
            for pair in other.items(budget)? {
                let [key, value] =
                    <[Value; 2]>::try_from(pair.items(budget)?).or_else(|items| {
                        fault(format!(
                            "dictionary update sequence element has length {}; 2 is required",
                            items.len()
                        ))
                    })?;
                pairs.push((key, value));
            }
        }
        (Some(_), more) => {
            return fault(format!(
                "dict expected at most 1 argument, got {}",
                more + 1
            ));
        }
    }
    budget.bytes((pairs.len() + args.named.len()) * 64)?;
    pairs.extend(args.named.into_iter().map(|(k, v)| {
        (
            Value::Str(Str {
                text: k,
                markup: false,
            }),
            v,
        )
    }));
    Ok(pairs)
}

// --- filters ---

/// `value | name(args)`.
pub(super) fn apply(run: &mut Run<'_>, name: &str, value: Value, args: CallArgs) -> Res<Value> {
    run.budget.steps(1)?;
    match name {
        "length" | "count" => Ok(Value::int(value.len(&mut run.budget)?)),
        "default" | "d" => {
            let [default, boolean] = args.bind(name, ["default_value", "boolean"])?;
            let replace =
                value.is_undefined() || boolean.is_some_and(|b| b.truth()) && !value.truth();
            Ok(if replace {
                default.unwrap_or_else(|| Value::from(""))
            } else {
                value
            })
        }
        "tojson" => to_json(run, &value, args),
        "items" => match &value {
            Value::Undefined(_) => Value::iter("generator", Vec::new(), &mut run.budget),
            Value::Dict(d) => {
                let pairs = methods::pairs(d, &mut run.budget)?;
                Value::iter("generator", pairs, &mut run.budget)
            }
            _ => fault("Can only get item pairs from a mapping."),
        },
        "map" | "select" | "reject" | "selectattr" | "rejectattr" | "list" | "join" | "first"
        | "last" | "random" | "sum" | "sort" | "dictsort" | "unique" | "groupby" | "min"
        | "max" | "reverse" | "batch" | "slice" => sequence_filter(run, name, value, args),
        "int" | "float" | "abs" | "round" | "filesizeformat" => {
            number_filter(run, name, &value, args)
        }
        "string" | "safe" | "escape" | "e" | "forceescape" | "striptags" | "urlencode"
        | "xmlattr" | "pprint" => markup_filter(run, name, &value, args),
        "attr" => {
            let [attr] = args.bind(name, ["name"])?;
            let attr = attr.unwrap_or(Value::None).to_text(&mut run.budget)?;
            match &value {
                Value::Dict(_) if methods::find(&value, &attr).is_none() => Ok(Value::Undefined(
                    format!("'dict object' has no attribute '{attr}'").into(),
                )),
                _ => run.attribute(&value, &attr),
            }
        }
        _ => text_filter(run, name, &value, args),
    }
}

/// A soft string: markup stays markup.
fn soft(value: &Value, budget: &mut Budget) -> Res<Str> {
    match value {
        Value::Str(s) => Ok(s.clone()),
        other => Ok(Str {
            text: other.to_text(budget)?,
            markup: false,
        }),
    }
}

fn text_filter(run: &mut Run<'_>, name: &str, value: &Value, args: CallArgs) -> Res<Value> {
    let budget = &mut run.budget;
    let known = [
        "trim",
        "upper",
        "lower",
        "capitalize",
        "title",
        "replace",
        "indent",
        "format",
        "truncate",
        "wordcount",
        "wordwrap",
        "center",
    ];
    if !known.contains(&name) {
        return fault(format!("No filter named '{name}'."));
    }
    let s = soft(value, budget)?;
    budget.bytes(s.text.len())?;
    let same = |text: String| Ok(Value::text(text, s.markup));
    match name {
        "trim" => {
            let [chars] = args.bind(name, ["chars"])?;
            let chars = match chars {
                None | Some(Value::None) => None,
                Some(chars) => Some(chars.to_text(budget)?),
            };
            same(methods::stripped(&s.text, "strip", chars.as_deref()).to_owned())
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
            let (old, new) = (old.to_text(budget)?, new.to_text(budget)?);
            let plain = Str {
                text: s.text.clone(),
                markup: s.markup && run.autoescape,
            };
            methods::replace(&plain, &old, &new, count.as_ref(), budget)
        }
        "indent" => same(indent(&s.text, args, budget)?),
        "format" => match (args.named.is_empty(), args.positional.is_empty()) {
            (false, false) => {
                fault("can't handle positional and keyword arguments at the same time")
            }
            (false, true) => {
                let pairs = args
                    .named
                    .into_iter()
                    .map(|(k, v)| (Value::from(&*k), v))
                    .collect();
                let named = Value::dict(pairs, budget)?;
                format::percent(&s, &named, budget)
            }
            (true, _) => {
                let values = Value::tuple(args.positional, budget)?;
                format::percent(&s, &values, budget)
            }
        },
        "truncate" => same(truncate(&s.text, args, budget)?),
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
            methods::call(run, &Value::Str(s.clone()), "center", args)
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

fn indent(t: &str, args: CallArgs, budget: &mut Budget) -> Res<String> {
    let [width, first, blank] = args.bind("indent", ["width", "first", "blank"])?;
    let by = match width {
        None => "    ".into(),
        Some(Value::Str(s)) => s.text,
        Some(other) => match other.as_int().map(usize::try_from) {
            Some(Ok(n)) => {
                budget.bytes(n)?;
                " ".repeat(n).into()
            }
            Some(Err(_)) => "".into(),
            None => return fault("can't multiply sequence by non-int"),
        },
    };
    let (first, blank) = (
        first.is_some_and(|f| f.truth()),
        blank.is_some_and(|b| b.truth()),
    );
    let with_newline = format!("{t}\n");
    let mut out = String::new();
    for (i, line) in text::lines(&with_newline, false).into_iter().enumerate() {
        budget.bytes(by.len() + line.len() + 1)?;
        if i > 0 {
            out.push('\n');
        }
        if (i == 0 && first) || (i > 0 && (blank || !line.is_empty())) {
            out.push_str(&by);
        }
        out.push_str(line);
    }
    Ok(out)
}

fn truncate(t: &str, args: CallArgs, budget: &mut Budget) -> Res<String> {
    let [length, kill, end, leeway] =
        args.bind("truncate", ["length", "killwords", "end", "leeway"])?;
    let size = |v: Option<Value>, default: usize| {
        v.and_then(|v| v.as_int())
            .and_then(|i| usize::try_from(i).ok())
            .unwrap_or(default)
    };
    let (length, leeway) = (size(length, 255), size(leeway, 5));
    let end = end.unwrap_or_else(|| Value::from("...")).to_text(budget)?;
    let end_chars = end.chars().count();
    if length < end_chars {
        return fault(format!("expected length >= {end_chars}, got {length}"));
    }
    if t.chars().count() <= length.saturating_add(leeway) {
        return Ok(t.to_owned());
    }
    let cut: String = t.chars().take(length - end_chars).collect();
    let kept = match kill.is_some_and(|k| k.truth()) {
        true => &cut,
        false => cut.rsplit_once(' ').map_or(&*cut, |(head, _)| head),
    };
    Ok(kept.to_owned() + &end)
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

fn number_filter(run: &mut Run<'_>, name: &str, value: &Value, args: CallArgs) -> Res<Value> {
    match value {
        Value::Undefined(message) => return fault(message.to_string()),
        Value::Str(s) => run.budget.bytes(s.text.len())?,
        _ => {}
    }
    match name {
        "int" => {
            let [default, base] = args.bind(name, ["default", "base"])?;
            let default = default.unwrap_or(Value::Int(0));
            Ok(to_int(value, base.as_ref()).unwrap_or(default))
        }
        "float" => {
            let [default] = args.bind(name, ["default"])?;
            let parsed = match value {
                Value::Str(s) => parse_float(&s.text),
                other => other.as_float(),
            };
            Ok(parsed.map_or_else(|| default.unwrap_or(Value::Float(0.0)), Value::Float))
        }
        "abs" => match (value, value.as_int().and_then(i128::checked_abs)) {
            (Value::Float(f), _) => Ok(Value::Float(f.abs())),
            (_, Some(i)) => Ok(Value::Int(i)),
            _ => fault(format!(
                "bad operand type for abs(): '{}'",
                value.type_name()
            )),
        },
        "round" => round(value, args, &mut run.budget),
        _ => {
            let [binary] = args.bind(name, ["binary"])?;
            let bytes = match value {
                Value::Str(s) => parse_float(&s.text),
                other => other.as_float(),
            };
            let Some(bytes) = bytes else {
                return fault("could not convert to float");
            };
            Ok(Value::from(file_size(
                bytes,
                binary.is_some_and(|b| b.truth()),
            )))
        }
    }
}

fn parse_float(text: &str) -> Option<f64> {
    let t = methods::stripped(text, "strip", None);
    let plain = t.trim_start_matches(['+', '-']).to_ascii_lowercase();
    if matches!(&*plain, "inf" | "infinity" | "nan")
        || plain.starts_with(|c: char| c.is_ascii_digit() || c == '.')
    {
        return t.replace('_', "").parse().ok();
    }
    None
}

fn to_int(value: &Value, base: Option<&Value>) -> Option<Value> {
    match value {
        Value::Big(_) => Some(value.clone()),
        Value::Float(f) if f.is_finite() => Some(Value::Int(f.trunc() as i128)),
        Value::Str(s) => {
            let base = base.and_then(Value::as_int).unwrap_or(10);
            let t = methods::stripped(&s.text, "strip", None).to_ascii_lowercase();
            let (negative, digits) = match t.strip_prefix('-') {
                Some(rest) => (true, rest),
                None => (false, t.strip_prefix('+').unwrap_or(&t)),
            };
            let (base, digits) = match (base, digits.get(..2)) {
                (16 | 0, Some("0x")) => (16, &digits[2..]),
                (8 | 0, Some("0o")) => (8, &digits[2..]),
                (2 | 0, Some("0b")) => (2, &digits[2..]),
                (0, _) => (10, digits),
                (base, _) => (base, digits),
            };
            let base = u32::try_from(base).ok().filter(|b| (2..=36).contains(b))?;
            let digits = digits.replace('_', "");
            let sign = if negative { "-" } else { "" };
            if !digits.starts_with(|c: char| c.is_ascii_alphanumeric()) {
                return parse_float(&s.text)
                    .filter(|f| f.is_finite())
                    .map(|f| Value::Int(f.trunc() as i128));
            }
            match i128::from_str_radix(&format!("{sign}{digits}"), base) {
                Ok(i) => Some(Value::Int(i)),
                Err(_) if base == 10 && digits.bytes().all(|b| b.is_ascii_digit()) => {
                    Value::integer(&format!("{sign}{digits}")).ok()
                }
                // int(float(value)), as the filter tries next.
                Err(_) => parse_float(&s.text)
                    .filter(|f| f.is_finite())
                    .map(|f| Value::Int(f.trunc() as i128)),
            }
        }
        other => other.as_int().map(Value::Int),
    }
}

fn round(value: &Value, args: CallArgs, budget: &mut Budget) -> Res<Value> {
    let [precision, method] = args.bind("round", ["precision", "method"])?;
    let precision = precision
        .and_then(|p| p.as_int())
        .unwrap_or(0)
        .clamp(-300, 300) as i32;
    let method = method
        .unwrap_or_else(|| Value::from("common"))
        .to_text(budget)?;
    let Some(f) = value.as_float() else {
        return fault(format!(
            "type {} doesn't define __round__ method",
            value.type_name()
        ));
    };
    let scale = 10f64.powi(precision);
    match (&*method, value) {
        ("common", Value::Int(_) | Value::Bool(_)) if precision >= 0 => {
            Ok(Value::Int(value.as_int().unwrap_or(0)))
        }
        ("common", _) if precision >= 0 => {
            let text = format!("{f:.*}", precision as usize);
            Ok(Value::Float(text.parse().unwrap_or(f)))
        }
        ("common", Value::Int(_) | Value::Bool(_)) => {
            Ok(Value::Int(((f * scale).round_ties_even() / scale) as i128))
        }
        ("common", _) => Ok(Value::Float((f * scale).round_ties_even() / scale)),
        ("ceil", _) => Ok(Value::Float((f * scale).ceil() / scale)),
        ("floor", _) => Ok(Value::Float((f * scale).floor() / scale)),
        _ => fault("method must be common, ceil or floor"),
    }
}

fn file_size(bytes: f64, binary: bool) -> String {
    let base: f64 = if binary { 1024.0 } else { 1000.0 };
    let units = match binary {
        true => ["KiB", "MiB", "GiB", "TiB", "PiB", "EiB", "ZiB", "YiB"],
        false => ["kB", "MB", "GB", "TB", "PB", "EB", "ZB", "YB"],
    };
    if bytes == 1.0 {
        return "1 Byte".into();
    }
    if bytes < base {
        return format!("{} Bytes", bytes as i64);
    }
    let mut unit = base;
    for (i, name) in units.iter().enumerate() {
        unit = base.powi(i as i32 + 2);
        if bytes < unit {
            return format!("{:.1} {name}", base * bytes / unit);
        }
    }
    format!("{:.1} {}", base * bytes / unit, units[7])
}

fn markup_filter(run: &mut Run<'_>, name: &str, value: &Value, args: CallArgs) -> Res<Value> {
    let budget = &mut run.budget;
    let s = soft(value, budget)?;
    budget.bytes(s.text.len())?;
    match name {
        "string" => Ok(Value::Str(s)),
        "safe" => Ok(Value::Str(Str {
            text: s.text,
            markup: true,
        })),
        "escape" | "e" if s.markup => Ok(Value::Str(s)),
        "escape" | "e" | "forceescape" => {
            budget.bytes(s.text.len().saturating_mul(5))?;
            Ok(Value::text(html_escape(&s.text), true))
        }
        "striptags" => Ok(Value::from(strip_tags(&s.text))),
        "pprint" => Ok(Value::from(value.repr(budget)?)),
        "urlencode" => url_encode(value, budget),
        _ => {
            let [space] = args.bind(name, ["autospace"])?;
            let Value::Dict(d) = value else {
                return fault("xmlattr needs a dict");
            };
            let mut out = String::new();
            for (key, value) in &d.entries {
                if matches!(value, Value::None | Value::Undefined(_)) {
                    continue;
                }
                let (key, value) = (key.to_text(budget)?, value.to_text(budget)?);
                if key.contains([' ', '/', '>', '=', '\t', '\n', '\u{c}']) {
                    return fault(format!("Invalid character in attribute name: '{key}'"));
                }
                let gap = if out.is_empty() && !space.as_ref().is_none_or(Value::truth) {
                    ""
                } else {
                    " "
                };
                budget.bytes(6 * (key.len() + value.len()) + 4)?;
                out.push_str(&format!(
                    "{gap}{}=\"{}\"",
                    html_escape(&key),
                    html_escape(&value)
                ));
            }
            Ok(Value::text(out, run.autoescape))
        }
    }
}

fn strip_tags(t: &str) -> String {
    let mut plain = String::with_capacity(t.len());
    let mut rest = t;
    while let Some(start) = rest.find('<') {
        let end = match rest[start..].starts_with("<!--") {
            true => rest[start..].find("-->").map(|e| e + 3),
            false => rest[start..].find('>').map(|e| e + 1),
        };
        let Some(end) = end else { break };
        plain.push_str(&rest[..start]);
        rest = &rest[start + end..];
    }
    plain.push_str(rest);
    let joined = text::words(&plain, usize::MAX).join(" ");
    // `&amp;` last, so that `&amp;lt;` gives `&lt;`.
    let named = [
        ("&lt;", "<"),
        ("&gt;", ">"),
        ("&quot;", "\""),
        ("&#34;", "\""),
        ("&#39;", "'"),
        ("&nbsp;", "\u{a0}"),
    ];
    named
        .iter()
        .fold(joined, |text, (entity, c)| text.replace(entity, c))
        .replace("&amp;", "&")
}

fn url_encode(value: &Value, budget: &mut Budget) -> Res<Value> {
    let quote = |value: &Value, form: bool, budget: &mut Budget| -> Res<String> {
        let t = value.to_text(budget)?;
        budget.bytes(t.len().saturating_mul(3))?;
        let mut out = String::new();
        for b in t.bytes() {
            match b {
                b'a'..=b'z' | b'A'..=b'Z' | b'0'..=b'9' | b'-' | b'_' | b'.' | b'~' => {
                    out.push(b as char)
                }
                b'/' if !form => out.push('/'),
                b' ' if form => out.push('+'),
                b => out.push_str(&format!("%{b:02X}")),
            }
        }
        Ok(out)
    };
    let pairs = match value {
        Value::Dict(d) => methods::pairs(d, budget)?,
        Value::Str(_) => return Ok(Value::from(quote(value, false, budget)?)),
        other => match other.items(budget) {
            Ok(items) => items,
            Err(_) => return Ok(Value::from(quote(value, false, budget)?)),
        },
    };
    let mut out = String::new();
    for pair in pairs {
        let pair = pair.items(budget)?;
        let [key, value] = &pair[..] else {
            return fault("urlencode needs pairs");
        };
        if !out.is_empty() {
            out.push('&');
        }
        out.push_str(&format!(
            "{}={}",
            quote(key, true, budget)?,
            quote(value, true, budget)?
        ));
    }
    Ok(Value::from(out))
}

/// transformers' tojson: json.dumps, without HTML escaping.
fn to_json(run: &mut Run<'_>, value: &Value, args: CallArgs) -> Res<Value> {
    let budget = &mut run.budget;
    let [ascii, indent, separators, sort] = args.bind(
        "tojson",
        ["ensure_ascii", "indent", "separators", "sort_keys"],
    )?;
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(s)) => Some(s.text.to_string()),
        Some(other) => match other.as_int() {
            Some(n) => {
                let n = usize::try_from(n).unwrap_or(0);
                budget.bytes(n)?;
                Some(" ".repeat(n))
            }
            None => {
                return fault(format!(
                    "can't multiply sequence by non-int of type '{}'",
                    other.type_name()
                ));
            }
        },
    };
    let (item_separator, key_separator) = match separators {
        None | Some(Value::None) => (
            (if indent.is_some() { "," } else { ", " }).to_owned(),
            ": ".to_owned(),
        ),
        Some(pair) => match &pair.items(budget)?[..] {
            [Value::Str(item), Value::Str(key)] => (item.text.to_string(), key.text.to_string()),
            _ => return fault("separators must be a pair of strings"),
        },
    };
    let json = Json {
        indent,
        item_separator,
        key_separator,
        sort_keys: sort.is_some_and(|s| s.truth()),
        ensure_ascii: ascii.is_some_and(|a| a.truth()),
    };
    let mut out = String::new();
    json.write(value, 0, &mut out, budget)?;
    Ok(Value::from(out))
}

// --- filters over sequences ---

fn sequence_filter(run: &mut Run<'_>, name: &str, value: Value, args: CallArgs) -> Res<Value> {
    match name {
        "list" => {
            let items = value.items(&mut run.budget)?;
            Value::list(items, &mut run.budget)
        }
        "first" => {
            let first = match &value {
                Value::Iter(i) => i.next(),
                other => other.items(&mut run.budget)?.into_iter().next(),
            };
            Ok(first
                .unwrap_or_else(|| Value::Undefined("No first item, sequence was empty.".into())))
        }
        "last" | "random" => {
            if let Value::Iter(i) = &value {
                return fault(format!("'{}' object is not reversible", i.type_name));
            }
            let mut items = value.items(&mut run.budget)?;
            let last = match name {
                "random" if !items.is_empty() => Some(items.swap_remove(any_index(items.len()))),
                _ => items.pop(),
            };
            Ok(last.unwrap_or_else(|| {
                Value::Undefined(format!("No {name} item, sequence was empty.").into())
            }))
        }
        "join" => join(run, &value, args),
        "map" => map(run, &value, args),
        "select" | "reject" | "selectattr" | "rejectattr" => select(run, name, &value, args),
        "reverse" => match &value {
            Value::Str(s) => {
                run.budget.bytes(s.text.len())?;
                Ok(Value::text(s.text.chars().rev().collect(), s.markup))
            }
            Value::Iter(_) => fault("argument must be iterable"),
            other => {
                let mut items = other.items(&mut run.budget)?;
                items.reverse();
                Value::iter("list_reverseiterator", items, &mut run.budget)
            }
        },
        "sum" => {
            let [attribute, start] = args.bind(name, ["attribute", "start"])?;
            let mut total = start.unwrap_or(Value::Int(0));
            for item in value.items(&mut run.budget)? {
                let item = by_attribute(run, &item, attribute.as_ref(), None)?;
                total = run.binary(Op::Add, &total, &item)?;
            }
            Ok(total)
        }
        "batch" | "slice" => batch(run, name, &value, args),
        "dictsort" => dict_sort(run, &value, args),
        "groupby" => group_by(run, &value, args),
        _ => ordered(run, name, &value, args),
    }
}

/// Some index below `len`, different from call to call.
fn any_index(len: usize) -> usize {
    use std::hash::{BuildHasher, Hasher, RandomState};
    (RandomState::new().build_hasher().finish() % len as u64) as usize
}

/// The `a.0.b` of an item; `default` where it is undefined.
fn by_attribute(
    run: &mut Run<'_>,
    item: &Value,
    attribute: Option<&Value>,
    default: Option<&Value>,
) -> Res<Value> {
    let mut value = item.clone();
    match attribute {
        None | Some(Value::None) => return Ok(value),
        Some(Value::Str(path)) => {
            for part in path.text.split('.') {
                let key = match part.bytes().all(|b| b.is_ascii_digit()) && !part.is_empty() {
                    true => Value::integer(part)?,
                    false => Value::from(part),
                };
                value = run.item(&value, &key)?;
                if let (true, Some(default)) = (value.is_undefined(), default) {
                    value = default.clone();
                }
            }
        }
        Some(key) => value = run.item(&value, key)?,
    }
    Ok(match default {
        Some(default) if value.is_undefined() => default.clone(),
        _ => value,
    })
}

fn join(run: &mut Run<'_>, value: &Value, args: CallArgs) -> Res<Value> {
    let [separator, attribute] = args.bind("join", ["d", "attribute"])?;
    let separator = separator.unwrap_or_else(|| Value::from(""));
    let mut out = String::new();
    let mut markup = false;
    let mut piece = |run: &mut Run<'_>, value: &Value, out: &mut String| -> Res<()> {
        let s = soft(value, &mut run.budget)?;
        run.budget.bytes(s.text.len())?;
        markup |= run.autoescape;
        match run.autoescape && !s.markup {
            true => out.push_str(&html_escape(&s.text)),
            false => out.push_str(&s.text),
        }
        Ok(())
    };
    for (i, item) in value.items(&mut run.budget)?.iter().enumerate() {
        if i > 0 {
            piece(run, &separator, &mut out)?;
        }
        let item = by_attribute(run, item, attribute.as_ref(), None)?;
        piece(run, &item, &mut out)?;
    }
    Ok(Value::text(out, markup))
}

fn map(run: &mut Run<'_>, value: &Value, mut args: CallArgs) -> Res<Value> {
    let mut out = Vec::new();
    // As in Jinja2, nothing falsy is walked over, None included.
    if !value.truth() {
        return Value::iter("generator", out, &mut run.budget);
    }
    if args.positional.is_empty() {
        let [attribute, default] = args.bind("map", ["attribute", "default"])?;
        let Some(attribute) = attribute else {
            return fault("map requires a filter argument");
        };
        for item in value.items(&mut run.budget)? {
            out.push(by_attribute(
                run,
                &item,
                Some(&attribute),
                default.as_ref(),
            )?);
        }
        return Value::iter("generator", out, &mut run.budget);
    }
    let filter = args.positional.remove(0).to_text(&mut run.budget)?;
    for item in value.items(&mut run.budget)? {
        run.budget
            .bytes(args.positional.len() * size_of::<Value>())?;
        let args = CallArgs {
            positional: args.positional.clone(),
            named: args.named.clone(),
        };
        out.push(run.nested_call(|run| apply(run, &filter, item, args))?);
    }
    Value::iter("generator", out, &mut run.budget)
}

fn select(run: &mut Run<'_>, name: &str, value: &Value, mut args: CallArgs) -> Res<Value> {
    if !value.truth() {
        return Value::iter("generator", Vec::new(), &mut run.budget);
    }
    let attribute = match name.ends_with("attr") {
        true if args.positional.is_empty() => return fault("Missing parameter for attribute name"),
        true => Some(args.positional.remove(0)),
        false => None,
    };
    let wanted = name.starts_with("select");
    let test_name = match args.positional.is_empty() {
        true => None,
        false => Some(args.positional.remove(0).to_text(&mut run.budget)?),
    };
    let mut out = Vec::new();
    for item in value.items(&mut run.budget)? {
        let tested = by_attribute(run, &item, attribute.as_ref(), None)?;
        let passes = match &test_name {
            None => tested.truth(),
            Some(test_name) => {
                run.budget
                    .bytes(args.positional.len() * size_of::<Value>())?;
                let args = CallArgs {
                    positional: args.positional.clone(),
                    named: args.named.clone(),
                };
                test(run, test_name, &tested, args)?
            }
        };
        if passes == wanted {
            out.push(item);
        }
    }
    Value::iter("generator", out, &mut run.budget)
}

fn batch(run: &mut Run<'_>, name: &str, value: &Value, args: CallArgs) -> Res<Value> {
    let [count, fill] = args.bind(name, ["linecount", "fill_with"])?;
    let items = value.items(&mut run.budget)?;
    let count = count
        .and_then(|c| c.as_int())
        .and_then(|c| usize::try_from(c).ok())
        .unwrap_or(0);
    if count == 0 || count > MAX_RANGE {
        return fault(format!(
            "{name} needs a count from 1 to {MAX_RANGE}, got {count}"
        ));
    }
    let fill = fill.filter(|f| !matches!(f, Value::None));
    let mut groups: Vec<Vec<Value>> = Vec::new();
    if name == "batch" {
        groups.extend(items.chunks(count).map(<[Value]>::to_vec));
        if let (Some(fill), Some(last)) = (&fill, groups.last_mut()) {
            run.budget.bytes(count * size_of::<Value>())?;
            last.resize(count, fill.clone());
        }
    } else {
        let (each, larger) = (items.len() / count, items.len() % count);
        let mut items = items.into_iter();
        for i in 0..count {
            let mut group: Vec<Value> = items
                .by_ref()
                .take(each + usize::from(i < larger))
                .collect();
            group.extend(fill.iter().filter(|_| i >= larger && larger > 0).cloned());
            groups.push(group);
        }
    }
    let lists = groups
        .into_iter()
        .map(|g| Value::list(g, &mut run.budget))
        .collect::<Res<Vec<_>>>()?;
    Value::iter("generator", lists, &mut run.budget)
}

/// What sorting compares: the value, strings in lower case unless case matters.
fn sort_key(value: Value, case_sensitive: bool, budget: &mut Budget) -> Res<Value> {
    match &value {
        Value::Str(s) if !case_sensitive => {
            budget.bytes(s.text.len())?;
            Ok(Value::from(s.text.to_lowercase()))
        }
        _ => Ok(value),
    }
}

/// A stable sort by a comparison that can fail and need not be consistent.
pub(super) fn sort_by<T>(
    items: &mut Vec<T>,
    mut order: impl FnMut(&T, &T) -> Res<Option<Ordering>>,
) -> Res<()> {
    let mut runs: std::collections::VecDeque<Vec<T>> =
        items.drain(..).map(|item| vec![item]).collect();
    while runs.len() > 1 {
        let mut merged = std::collections::VecDeque::with_capacity(runs.len() / 2 + 1);
        while let Some(left) = runs.pop_front() {
            match runs.pop_front() {
                None => merged.push_back(left),
                Some(right) => merged.push_back(merge(left, right, &mut order)?),
            }
        }
        runs = merged;
    }
    *items = runs.pop_front().unwrap_or_default();
    Ok(())
}

fn merge<T>(
    left: Vec<T>,
    right: Vec<T>,
    order: &mut impl FnMut(&T, &T) -> Res<Option<Ordering>>,
) -> Res<Vec<T>> {
    let mut out = Vec::with_capacity(left.len() + right.len());
    let (mut left, mut right) = (left.into_iter().peekable(), right.into_iter().peekable());
    while let (Some(a), Some(b)) = (left.peek(), right.peek()) {
        match order(b, a)? == Some(Ordering::Less) {
            true => out.extend(right.next()),
            false => out.extend(left.next()),
        }
    }
    out.extend(left);
    out.extend(right);
    Ok(out)
}

/// sort, unique, min, max.
fn ordered(run: &mut Run<'_>, name: &str, value: &Value, args: CallArgs) -> Res<Value> {
    let (reverse, case, attribute) = match name {
        "sort" => {
            let [reverse, case, attribute] =
                args.bind(name, ["reverse", "case_sensitive", "attribute"])?;
            (reverse.is_some_and(|r| r.truth()), case, attribute)
        }
        _ => {
            let [case, attribute] = args.bind(name, ["case_sensitive", "attribute"])?;
            (false, case, attribute)
        }
    };
    let case = case.is_some_and(|c| c.truth());
    let mut keyed = Vec::new();
    for item in value.items(&mut run.budget)? {
        keyed.push((attribute_key(run, &item, attribute.as_ref(), case)?, item));
    }
    let budget = &mut run.budget;
    match name {
        "sort" => {
            sort_by(&mut keyed, |a, b| {
                a.0.compare(&b.0, "<", budget)
                    .map(|o| if reverse { o.map(Ordering::reverse) } else { o })
            })?;
            Value::list(keyed.into_iter().map(|(_, item)| item).collect(), budget)
        }
        "unique" => {
            let mut seen: Vec<(Value, Value)> = Vec::new();
            for (key, item) in keyed {
                let mut known = false;
                for (other, _) in &seen {
                    known = known || other.equals(&key, budget)?;
                }
                if !known {
                    seen.push((key, item));
                }
            }
            Value::iter(
                "generator",
                seen.into_iter().map(|(_, item)| item).collect(),
                budget,
            )
        }
        _ => {
            let wanted = if name == "min" {
                Ordering::Less
            } else {
                Ordering::Greater
            };
            let mut best: Option<(Value, Value)> = None;
            for (key, item) in keyed {
                let better = match &best {
                    None => true,
                    Some((other, _)) => key.compare(other, "<", budget)? == Some(wanted),
                };
                if better {
                    best = Some((key, item));
                }
            }
            Ok(best.map_or_else(
                || Value::Undefined("No aggregated item, sequence was empty.".into()),
                |b| b.1,
            ))
        }
    }
}

/// A sort key by one attribute or several (`"a,b"`).
fn attribute_key(
    run: &mut Run<'_>,
    item: &Value,
    attribute: Option<&Value>,
    case: bool,
) -> Res<Value> {
    match attribute {
        Some(Value::Str(s)) if s.text.contains(',') => {
            let mut keys = Vec::new();
            for part in s.text.split(',') {
                let value = by_attribute(run, item, Some(&Value::from(part)), None)?;
                keys.push(sort_key(value, case, &mut run.budget)?);
            }
            Value::list(keys, &mut run.budget)
        }
        _ => {
            let value = by_attribute(run, item, attribute, None)?;
            sort_key(value, case, &mut run.budget)
        }
    }
}

fn dict_sort(run: &mut Run<'_>, value: &Value, args: CallArgs) -> Res<Value> {
    let [case, by, reverse] = args.bind("dictsort", ["case_sensitive", "by", "reverse"])?;
    let budget = &mut run.budget;
    let by = by.unwrap_or_else(|| Value::from("key")).to_text(budget)?;
    if !matches!(&*by, "key" | "value") {
        return fault("You can only sort by either \"key\" or \"value\"");
    }
    let (case, reverse) = (
        case.is_some_and(|c| c.truth()),
        reverse.is_some_and(|r| r.truth()),
    );
    let Value::Dict(dict) = value else {
        return fault(format!(
            "'{}' object has no attribute 'items'",
            value.type_name()
        ));
    };
    let mut keyed = Vec::new();
    for (k, v) in &dict.entries {
        let pair = Value::tuple(vec![k.clone(), v.clone()], budget)?;
        keyed.push((
            sort_key(if &*by == "key" { k } else { v }.clone(), case, budget)?,
            pair,
        ));
    }
    sort_by(&mut keyed, |a, b| {
        a.0.compare(&b.0, "<", budget)
            .map(|o| if reverse { o.map(Ordering::reverse) } else { o })
    })?;
    Value::list(keyed.into_iter().map(|(_, pair)| pair).collect(), budget)
}

fn group_by(run: &mut Run<'_>, value: &Value, args: CallArgs) -> Res<Value> {
    let [attribute, default, case] =
        args.bind("groupby", ["attribute", "default", "case_sensitive"])?;
    let case = case.is_some_and(|c| c.truth());
    let mut keyed = Vec::new();
    for item in value.items(&mut run.budget)? {
        let key = by_attribute(run, &item, attribute.as_ref(), default.as_ref())?;
        keyed.push((sort_key(key.clone(), case, &mut run.budget)?, key, item));
    }
    let budget = &mut run.budget;
    sort_by(&mut keyed, |a, b| a.0.compare(&b.0, "<", budget))?;
    let mut groups: Vec<(Value, Value, Vec<Value>)> = Vec::new();
    for (sorted, key, item) in keyed {
        let same = match groups.last() {
            Some((last, ..)) => last.equals(&sorted, budget)?,
            None => false,
        };
        match groups.last_mut() {
            Some((_, _, items)) if same => items.push(item),
            _ => groups.push((sorted, key, vec![item])),
        }
    }
    let mut out = Vec::new();
    for (_, key, items) in groups {
        let items = Value::list(items, budget)?;
        out.push(Value::tuple(vec![key, items], budget)?);
    }
    Value::list(out, budget)
}

// --- tests ---

/// `value is name(args)`.
pub(super) fn test(run: &mut Run<'_>, name: &str, value: &Value, args: CallArgs) -> Res<bool> {
    let budget = &mut run.budget;
    budget.steps(1)?;
    if let Value::Str(s) = value {
        budget.steps(s.text.len() / 64)?;
    }
    if let Some(op) = comparison(name) {
        let [other] = args.bind(name, ["other"])?;
        let Some(other) = other else {
            return fault(format!("test '{name}' needs an argument"));
        };
        return compare(op, value, &other, budget);
    }
    if matches!(name, "divisibleby" | "sameas") {
        let [other] = args.bind(name, ["other"])?;
        let Some(other) = other else {
            return fault(format!("test '{name}' needs an argument"));
        };
        if name == "sameas" {
            return Ok(value.type_name() == other.type_name() && value.equals(&other, budget)?);
        }
        let rest = run.binary(Op::Rem, value, &other)?;
        return rest.equals(&Value::Int(0), &mut run.budget);
    }
    let [] = args.bind(name, [])?;
    if matches!(name, "odd" | "even") {
        let rest = run.binary(Op::Rem, value, &Value::Int(2))?;
        return rest.equals(&Value::Int(i128::from(name == "odd")), &mut run.budget);
    }
    Ok(match name {
        "defined" => !value.is_undefined(),
        "undefined" => value.is_undefined(),
        "none" => matches!(value, Value::None),
        "boolean" => matches!(value, Value::Bool(_)),
        "true" => matches!(value, Value::Bool(true)),
        "false" => matches!(value, Value::Bool(false)),
        "integer" => matches!(value, Value::Int(_) | Value::Big(_)),
        "float" => matches!(value, Value::Float(_)),
        "number" => matches!(
            value,
            Value::Int(_) | Value::Big(_) | Value::Float(_) | Value::Bool(_)
        ),
        "string" => matches!(value, Value::Str(_)),
        "mapping" => matches!(value, Value::Dict(_)),
        "escaped" => matches!(value, Value::Str(Str { markup: true, .. })),
        "sequence" => matches!(
            value,
            Value::Str(_)
                | Value::List(_)
                | Value::Tuple(_)
                | Value::Dict(_)
                | Value::Range(_)
                | Value::Undefined(_)
        ),
        "iterable" => matches!(
            value,
            Value::Str(_)
                | Value::List(_)
                | Value::Tuple(_)
                | Value::Dict(_)
                | Value::Range(_)
                | Value::View(_)
                | Value::Iter(_)
                | Value::Loop(_)
                | Value::Undefined(_)
        ),
        "callable" => matches!(
            value,
            Value::Function(_)
                | Value::Method(_)
                | Value::Macro(_)
                | Value::Loop(_)
                | Value::Joiner(_)
                | Value::Undefined(_)
        ),
        "lower" => methods::is_lower(&value.to_text(budget)?),
        "upper" => {
            let t = value.to_text(budget)?;
            t.chars().any(text::is_upper)
                && !t.chars().any(|c| text::is_cased(c) && !text::is_upper(c))
        }
        "filter" => FILTERS.contains(&&*value.to_text(budget)?),
        "test" => TESTS.contains(&&*value.to_text(budget)?),
        _ => return fault(format!("No test named '{name}'.")),
    })
}

fn comparison(name: &str) -> Option<Comparison> {
    Some(match name {
        "eq" | "equalto" | "==" => Comparison::Eq,
        "ne" | "!=" => Comparison::Ne,
        "lt" | "lessthan" | "<" => Comparison::Lt,
        "le" | "<=" => Comparison::Le,
        "gt" | "greaterthan" | ">" => Comparison::Gt,
        "ge" | ">=" => Comparison::Ge,
        "in" => Comparison::In,
        _ => return None,
    })
}

const FILTERS: &[&str] = &[
    "abs",
    "attr",
    "batch",
    "capitalize",
    "center",
    "count",
    "d",
    "default",
    "dictsort",
    "e",
    "escape",
    "filesizeformat",
    "first",
    "float",
    "forceescape",
    "format",
    "groupby",
    "indent",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "pprint",
    "random",
    "reject",
    "rejectattr",
    "replace",
    "reverse",
    "round",
    "safe",
    "select",
    "selectattr",
    "slice",
    "sort",
    "string",
    "striptags",
    "sum",
    "title",
    "tojson",
    "trim",
    "truncate",
    "unique",
    "upper",
    "urlencode",
    "wordcount",
    "wordwrap",
    "xmlattr",
];
const TESTS: &[&str] = &[
    "!=",
    "<",
    "<=",
    "==",
    ">",
    ">=",
    "boolean",
    "callable",
    "defined",
    "divisibleby",
    "eq",
    "equalto",
    "escaped",
    "even",
    "false",
    "filter",
    "float",
    "ge",
    "greaterthan",
    "gt",
    "in",
    "integer",
    "iterable",
    "le",
    "lessthan",
    "lower",
    "lt",
    "mapping",
    "ne",
    "none",
    "number",
    "odd",
    "sameas",
    "sequence",
    "string",
    "test",
    "true",
    "undefined",
    "upper",
];
