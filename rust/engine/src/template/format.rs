//! Python's three ways to format: `%`, str.format and format(); and JSON as json.dumps writes it.

use std::borrow::Cow;

use num_bigint::Sign;

use super::eval::index;
use super::ops::as_big;
use super::origin::{Origin, Str, Text};
use super::run::{CallArgs, Run};
use super::value::{Budget, Res, Value, fault, float_repr, html_escape};

/// Widths and precisions beyond this are refused (what they make is paid for, too).
const MAX_WIDTH: usize = 1 << 30;
/// No float has as many digits; Rust's own formatting ends at 65,535.
const MAX_DIGITS: usize = 1_100;

/// A parsed format specification: `[[fill]align][sign][#][0][width][,][.precision][type]`.
#[derive(Default)]
struct Spec {
    fill: Option<char>,
    align: Option<char>,
    sign: Option<char>,
    alternate: bool,
    width: usize,
    comma: Option<char>,
    precision: Option<usize>,
    kind: Option<char>,
    /// The padding comes from a zero before the width: of text, it goes behind.
    zeros: bool,
    /// Negative zero is written as zero.
    no_minus_zero: bool,
}

fn number(chars: &mut std::iter::Peekable<std::str::Chars<'_>>) -> Res<Option<usize>> {
    let mut found = None;
    while let Some(digit) = chars.peek().and_then(|c| c.to_digit(10)) {
        chars.next();
        let n = found.unwrap_or(0) * 10 + digit as usize;
        if n > MAX_WIDTH {
            return fault(format!("format width or precision above {MAX_WIDTH}"));
        }
        found = Some(n);
    }
    Ok(found)
}

impl Spec {
    fn parse(text: &str) -> Res<Spec> {
        let mut spec = Spec::default();
        let mut chars = text.chars().peekable();
        let is_align = |c: char| matches!(c, '<' | '>' | '=' | '^');
        let mut ahead = text.chars();
        match (ahead.next(), ahead.next()) {
            (Some(fill), Some(align)) if is_align(align) => {
                (spec.fill, spec.align) = (Some(fill), Some(align));
                chars.nth(1);
            }
            (Some(align), _) if is_align(align) => {
                spec.align = Some(align);
                chars.next();
            }
            _ => {}
        }
        spec.sign = chars.next_if(|c| matches!(c, '+' | '-' | ' '));
        spec.no_minus_zero = chars.next_if_eq(&'z').is_some();
        spec.alternate = chars.next_if_eq(&'#').is_some();
        if chars.next_if_eq(&'0').is_some() {
            spec.fill = spec.fill.or(Some('0'));
            spec.zeros = spec.align.is_none();
            spec.align = spec.align.or(Some('='));
        }
        spec.width = number(&mut chars)?.unwrap_or(0);
        spec.comma = chars.next_if(|c| matches!(c, ',' | '_'));
        if chars.next_if_eq(&'.').is_some() {
            let Some(precision) = number(&mut chars)? else {
                return fault("Format specifier missing precision");
            };
            spec.precision = Some(precision);
        }
        spec.kind = chars.next();
        match chars.next() {
            None => Ok(spec),
            Some(_) => fault(format!("Invalid format specifier '{text}'")),
        }
    }

    fn pad(&self, sign: &str, body: &str, default: char) -> String {
        let fill = self.fill.unwrap_or(' ');
        let missing = self
            .width
            .saturating_sub(sign.chars().count() + body.chars().count());
        let fills = |n: usize| fill.to_string().repeat(n);
        match self.align.unwrap_or(default) {
            '>' => fills(missing) + sign + body,
            '=' => sign.to_owned() + &fills(missing) + body,
            '^' => fills(missing / 2) + sign + body + &fills(missing - missing / 2),
            _ => format!("{sign}{body}{}", fills(missing)),
        }
    }

    fn signed(&self, negative: bool) -> &'static str {
        match (negative, self.sign) {
            (true, _) => "-",
            (false, Some('+')) => "+",
            (false, Some(' ')) => " ",
            _ => "",
        }
    }
}

/// Digits in groups of three before the point.
fn grouped(body: &str, comma: Option<char>) -> String {
    let end = body
        .find(|c: char| !c.is_ascii_digit())
        .unwrap_or(body.len());
    in_groups(body, end, comma, 3)
}

/// The first `end` digits in groups.
fn in_groups(body: &str, end: usize, comma: Option<char>, size: usize) -> String {
    let Some(comma) = comma else {
        return body.to_owned();
    };
    let mut out = String::new();
    for (i, c) in body[..end].chars().enumerate() {
        if i > 0 && (end - i).is_multiple_of(size) {
            out.push(comma);
        }
        out.push(c);
    }
    out + &body[end..]
}

/// `format(value, spec)`.
pub(super) fn format_value(value: &Value, spec: &str, budget: &mut Budget) -> Res<String> {
    if spec.is_empty() {
        return Ok(value.to_text(budget)?.to_string());
    }
    let spec = Spec::parse(spec)?;
    budget.bytes(spec.width + spec.precision.unwrap_or(0))?;
    match value {
        Value::Str(s) => {
            if !matches!(spec.kind, None | Some('s')) {
                return fault(format!(
                    "Unknown format code for object of type '{}'",
                    value.type_name()
                ));
            }
            if let Some(separator) = spec.comma {
                return fault(format!("Cannot specify '{separator}' with 's'."));
            }
            if spec.sign.is_some() || spec.alternate {
                let what = if spec.sign.is_some() {
                    "Sign"
                } else {
                    "Alternate form (#)"
                };
                return fault(format!("{what} not allowed in string format specifier"));
            }
            budget.bytes(s.text.len())?;
            let cut: String = s
                .text
                .chars()
                .take(spec.precision.unwrap_or(usize::MAX))
                .collect();
            match (spec.align, spec.zeros) {
                (Some('='), false) => fault("'=' alignment not allowed in string format specifier"),
                (_, true) => Ok(Spec {
                    align: Some('<'),
                    ..spec
                }
                .pad("", &cut, '<')),
                _ => Ok(spec.pad("", &cut, '<')),
            }
        }
        Value::Int(_) | Value::Bool(_) | Value::Big(_) => format_int(value, &spec),
        Value::Float(f) => format_float(*f, &spec),
        other => fault(format!(
            "unsupported format string passed to {}.__format__",
            other.type_name()
        )),
    }
}

fn format_int(value: &Value, spec: &Spec) -> Res<String> {
    let is_float = matches!(spec.kind, Some('e' | 'E' | 'f' | 'F' | 'g' | 'G' | '%'));
    if is_float {
        return format_float(finite(value)?, spec);
    }
    if spec.precision.is_some() {
        return fault("Precision not allowed in integer format specifier");
    }
    let radix = match spec.kind {
        Some('x' | 'X') => 16,
        Some('o') => 8,
        Some('b') => 2,
        _ => 10,
    };
    let (negative, digits) = digits(value, radix).unwrap_or_default();
    let digits = match spec.kind {
        None | Some('d' | 'n') => grouped(&digits, spec.comma),
        Some(kind @ ('x' | 'X' | 'o' | 'b')) => {
            if spec.comma == Some(',') {
                return fault(format!("Cannot specify ',' with '{kind}'."));
            }
            let grouped = in_groups(&digits, digits.len(), spec.comma, 4);
            match kind {
                'X' => grouped.to_uppercase(),
                _ => grouped,
            }
        }
        Some('c') => {
            let code = value.as_int().and_then(|i| u32::try_from(i).ok());
            match code.and_then(char::from_u32) {
                Some(c) => c.to_string(),
                None => return fault("%c arg not in range(0x110000)"),
            }
        }
        Some(kind) => {
            return fault(format!(
                "Unknown format code '{kind}' for object of type 'int'"
            ));
        }
    };
    let prefix = match spec.kind {
        Some(kind @ ('x' | 'X' | 'o' | 'b')) if spec.alternate => format!("0{kind}"),
        _ => String::new(),
    };
    let sign = format!("{}{prefix}", spec.signed(negative));
    Ok(spec.pad(&sign, &digits, '>'))
}

/// An integer as a float that holds it.
fn finite(value: &Value) -> Res<f64> {
    match value.as_float() {
        Some(f) if f.is_finite() => Ok(f),
        _ => fault("int too large to convert to float"),
    }
}

fn format_float(f: f64, spec: &Spec) -> Res<String> {
    let size = f.abs();
    let precision = spec.precision.unwrap_or(6);
    // The digits that there are; behind them stand zeros.
    let (precision, zeros) = (
        precision.min(MAX_DIGITS),
        "0".repeat(precision.saturating_sub(MAX_DIGITS)),
    );
    let body = match spec.kind {
        _ if !size.is_finite() => float_repr(size),
        None if spec.precision.is_none() => float_repr(size),
        None => {
            let text = general(size, precision, spec.alternate);
            if text.contains(['.', 'e']) {
                text
            } else {
                text + ".0"
            }
        }
        Some('f' | 'F') => format!("{size:.precision$}{zeros}"),
        Some('%') => format!("{:.precision$}{zeros}%", size * 100.0),
        Some('e') => exponential(size, precision, &zeros),
        Some('E') => exponential(size, precision, &zeros).to_uppercase(),
        Some('g' | 'n') => general(size, precision, spec.alternate),
        Some('G') => general(size, precision, spec.alternate).to_uppercase(),
        Some(kind) => {
            return fault(format!(
                "Unknown format code '{kind}' for object of type 'float'"
            ));
        }
    };
    let is_zero = spec.no_minus_zero && !body.contains(|c: char| ('1'..='9').contains(&c));
    Ok(spec.pad(
        spec.signed(f.is_sign_negative() && !f.is_nan() && !is_zero),
        &grouped(&body, spec.comma),
        '>',
    ))
}

fn exponential(f: f64, precision: usize, zeros: &str) -> String {
    let text = format!("{f:.precision$e}");
    let (digits, exponent) = text.split_once('e').unwrap_or((&text, "0"));
    let exponent: i32 = exponent.parse().unwrap_or(0);
    format!(
        "{digits}{zeros}e{}{:02}",
        if exponent < 0 { '-' } else { '+' },
        exponent.abs()
    )
}

fn general(f: f64, precision: usize, alternate: bool) -> String {
    let precision = precision.max(1);
    let scientific = format!("{f:.*e}", precision - 1);
    let exponent: i32 = scientific
        .split_once('e')
        .and_then(|(_, e)| e.parse().ok())
        .unwrap_or(0);
    let trimmed = |text: String| match text.contains('.') && !alternate {
        true => text.trim_end_matches('0').trim_end_matches('.').to_owned(),
        false => text,
    };
    if exponent < -4 || exponent >= precision as i32 {
        let text = exponential(f, precision - 1, "");
        let (digits, exponent) = text.split_once('e').unwrap_or((&text, "+00"));
        return trimmed(digits.to_owned()) + "e" + exponent;
    }
    let after = (precision as i32 - 1 - exponent).max(0) as usize;
    trimmed(format!("{f:.after$}"))
}

/// `template % values`.
pub(super) fn percent(template: &Str, values: &Value, budget: &mut Budget) -> Res<Value> {
    let mut given: Vec<Value> = match values {
        Value::Tuple(t) => t.items.clone(),
        other => vec![other.clone()],
    };
    given.reverse();
    let mut out = Text::default();
    let text = &*template.text;
    let mut at = 0;
    let mut keyed = false;
    while let Some(found) = text[at..].find('%') {
        budget.bytes(found + 8)?;
        out.part(template, at..at + found);
        at += found + 1;
        let mut key = None;
        if let Some(inner) = text[at..].strip_prefix('(') {
            let Some((name, _)) = inner.split_once(')') else {
                return fault("incomplete format key");
            };
            (key, keyed) = (Some(name), true);
            at += name.len() + 2;
        }
        let (directive, after) = directive(&text[at..], &mut given)?;
        at = text.len() - after.len();
        if directive.kind == Some('%') {
            out.part(template, at - 1..at);
            continue;
        }
        let value = match (key, values) {
            (Some(key), Value::Dict(dict)) => match dict.get_str(key) {
                Some(value) => value.clone(),
                None => return fault(format!("'{key}'")),
            },
            (Some(_), _) => return fault("format requires a mapping"),
            (None, _) => match given.pop() {
                Some(value) => value,
                None => return fault("not enough arguments for format string"),
            },
        };
        budget.bytes(directive.width + directive.precision.unwrap_or(0))?;
        let text = percent_value(&value, &directive, budget)?;
        let origin = origin_of(&value, budget);
        match template.markup && needs_escape(&value) {
            true => out.made(&html_escape(&text), &origin),
            false => out.made(&text, &origin),
        }
    }
    budget.bytes(text.len() - at)?;
    out.part(template, at..text.len());
    // What can be asked for items counts as a mapping.
    let mapping = matches!(
        values,
        Value::Dict(_) | Value::List(_) | Value::Range(_) | Value::Undefined(_)
    );
    if !keyed && !given.is_empty() && !mapping {
        return fault("not all arguments converted during string formatting");
    }
    Ok(Value::Str(out.finish(template.markup)))
}

/// Where the text of a formatted value comes from, as a whole.
fn origin_of(value: &Value, budget: &Budget) -> Origin {
    match value {
        Value::Str(s) => s.origin.clone(),
        _ => budget.unsure(),
    }
}

/// Is this a text that a safe template must escape?
fn needs_escape(value: &Value) -> bool {
    !matches!(
        value,
        Value::Str(Str { markup: true, .. }) | Value::Int(_) | Value::Float(_) | Value::Bool(_)
    )
}

/// One directive after its `%` and key: flags, width, precision, type.
fn directive<'t>(rest: &'t str, given: &mut Vec<Value>) -> Res<(Spec, &'t str)> {
    let mut spec = Spec {
        align: Some('>'),
        ..Spec::default()
    };
    let mut chars = rest.chars().peekable();
    while let Some(flag) = chars.next_if(|c| "-+ #0".contains(*c)) {
        match flag {
            '-' => (spec.align, spec.fill) = (Some('<'), None),
            '0' if spec.align == Some('>') => (spec.align, spec.fill) = (Some('='), Some('0')),
            '#' => spec.alternate = true,
            '+' => spec.sign = Some('+'),
            ' ' => spec.sign = spec.sign.or(Some(' ')),
            _ => {}
        }
    }
    let star = |given: &mut Vec<Value>| match given.pop().and_then(|v| v.as_int()) {
        Some(n) if n.unsigned_abs() <= MAX_WIDTH as u128 => Ok(n),
        _ => fault("* wants int"),
    };
    spec.width = match chars.next_if_eq(&'*') {
        Some(_) => {
            let width = star(given)?;
            if width < 0 {
                (spec.align, spec.fill) = (Some('<'), None);
            }
            width.unsigned_abs() as usize
        }
        None => number(&mut chars)?.unwrap_or(0),
    };
    if chars.next_if_eq(&'.').is_some() {
        spec.precision = Some(match chars.next_if_eq(&'*') {
            Some(_) => star(given)?.max(0) as usize,
            None => number(&mut chars)?.unwrap_or(0),
        });
    }
    while chars.next_if(|c| "hlL".contains(*c)).is_some() {}
    spec.kind = chars.next();
    if spec.kind.is_none() {
        return fault("incomplete format");
    }
    let left: usize = chars.map(char::len_utf8).sum();
    Ok((spec, &rest[rest.len() - left..]))
}

fn percent_value(value: &Value, spec: &Spec, budget: &mut Budget) -> Res<String> {
    let as_text = |text: &str| {
        let cut: String = text
            .chars()
            .take(spec.precision.unwrap_or(usize::MAX))
            .collect();
        let padded = Spec {
            fill: None,
            align: spec.align.map(|a| if a == '=' { '>' } else { a }),
            width: spec.width,
            ..Spec::default()
        };
        padded.pad("", &cut, '>')
    };
    match spec.kind.unwrap_or('s') {
        's' => Ok(as_text(&value.to_text(budget)?)),
        'r' => Ok(as_text(&value.repr(budget)?)),
        'a' => Ok(as_text(&ascii(&value.repr(budget)?))),
        'c' => match value {
            Value::Str(s) if s.text.chars().count() == 1 => Ok(as_text(&s.text)),
            Value::Int(i) => match u32::try_from(*i).ok().and_then(char::from_u32) {
                Some(c) => Ok(as_text(&c.to_string())),
                None => fault("%c arg not in range(0x110000)"),
            },
            // True and False are numbers.
            Value::Bool(b) => Ok(as_text(if *b { "\u{1}" } else { "\0" })),
            _ => fault("%c requires int or char"),
        },
        kind @ ('d' | 'i' | 'u' | 'x' | 'X' | 'o') => percent_int(value, kind, spec),
        'e' | 'E' | 'f' | 'F' | 'g' | 'G' => match value.as_float() {
            Some(_) if matches!(value, Value::Big(_)) => format_float(finite(value)?, spec),
            Some(f) => format_float(f, spec),
            None => fault(format!("must be real number, not {}", value.type_name())),
        },
        other => fault(format!("unsupported format character '{other}'")),
    }
}

fn percent_int(value: &Value, kind: char, spec: &Spec) -> Res<String> {
    let whole;
    let value = match (value, kind) {
        (Value::Float(f), 'd' | 'i' | 'u') if f.is_finite() => {
            whole = Value::integer(&format!("{:.0}", f.trunc() + 0.0))?;
            &whole
        }
        (other, _) => other,
    };
    let radix = match kind {
        'x' | 'X' => 16,
        'o' => 8,
        _ => 10,
    };
    let Some((negative, digits)) = digits(value, radix) else {
        return fault(format!(
            "%{kind} format: a real number is required, not {}",
            value.type_name()
        ));
    };
    let (prefix, digits) = match kind {
        'x' => ("0x", digits),
        'X' => ("0X", digits.to_uppercase()),
        'o' => ("0o", digits),
        _ => ("", digits),
    };
    let prefix = if spec.alternate { prefix } else { "" };
    let zeros = spec.precision.unwrap_or(0).saturating_sub(digits.len());
    let sign = spec.signed(negative).to_owned() + prefix;
    Ok(spec.pad(&sign, &("0".repeat(zeros) + &digits), '>'))
}

/// An integer's sign and digits, in small letters; None for what is none.
fn digits(value: &Value, radix: u32) -> Option<(bool, String)> {
    let Some(i) = value.as_int() else {
        let big = as_big(value)?;
        return Some((
            big.sign() == Sign::Minus,
            big.magnitude().to_str_radix(radix),
        ));
    };
    let size = i.unsigned_abs();
    let text = match radix {
        2 => format!("{size:b}"),
        8 => format!("{size:o}"),
        16 => format!("{size:x}"),
        _ => size.to_string(),
    };
    Some((i < 0, text))
}

/// `template.format(...)`, in the sandbox: attributes and items as templates see them.
pub(super) fn format_method(run: &mut Run<'_>, template: &Str, args: &CallArgs) -> Res<Value> {
    let mut automatic = Some(0);
    let made = if template.markup {
        let args = escaped(args, &mut run.budget)?;
        format_fields(run, template, &args, &mut automatic, 0)?
    } else {
        format_fields(run, template, args, &mut automatic, 0)?
    };
    Ok(Value::Str(made.finish(template.markup)))
}

/// The arguments of a safe template: plain strings escaped.
fn escaped(args: &CallArgs, budget: &mut Budget) -> Res<CallArgs> {
    let mut escape = |value: &Value| match value {
        Value::Str(s) if !s.markup => {
            budget.bytes(s.text.len().saturating_mul(5))?;
            Ok(Value::Str(Str {
                markup: true,
                ..s.made_into(html_escape(&s.text))
            }))
        }
        other => Ok(other.clone()),
    };
    let positional = args
        .positional
        .iter()
        .map(&mut escape)
        .collect::<Res<_>>()?;
    let named = args
        .named
        .iter()
        .map(|(k, v)| Ok((k.clone(), escape(v)?)))
        .collect::<Res<_>>()?;
    Ok(CallArgs { positional, named })
}

/// `automatic` counts the fields without a number; None once a numbered one was seen.
fn format_fields(
    run: &mut Run<'_>,
    template: &Str,
    args: &CallArgs,
    automatic: &mut Option<usize>,
    depth: usize,
) -> Res<Text> {
    if depth > 1 {
        return fault("Max string recursion exceeded");
    }
    let mut out = Text::default();
    let text = &*template.text;
    let mut at = 0;
    while let Some(found) = text[at..].find(['{', '}']) {
        run.budget.bytes(found + 8)?;
        out.part(template, at..at + found);
        at += found;
        let brace = &text[at..=at];
        at += 1;
        if text[at..].starts_with(brace) {
            out.part(template, at - 1..at);
            at += 1;
            continue;
        }
        if brace == "}" {
            return fault("Single '}' encountered in format string");
        }
        let Some(end) = field_end(&text[at..]) else {
            return fault("expected '}' before end of string");
        };
        let (made, origin) = format_field(run, &text[at..at + end], args, automatic, depth)?;
        out.made(&made, &origin);
        at += end + 1;
    }
    run.budget.bytes(text.len() - at)?;
    out.part(template, at..text.len());
    Ok(out)
}

/// Where the brace closes that was opened before `text`.
fn field_end(text: &str) -> Option<usize> {
    let mut open = 1;
    for (i, c) in text.char_indices() {
        match c {
            '{' => open += 1,
            '}' => open -= 1,
            _ => {}
        }
        if open == 0 {
            return Some(i);
        }
    }
    None
}

fn format_field(
    run: &mut Run<'_>,
    field: &str,
    args: &CallArgs,
    automatic: &mut Option<usize>,
    depth: usize,
) -> Res<(String, Origin)> {
    let end = field.find(['!', ':']).unwrap_or(field.len());
    let (path, mut rest) = field.split_at(end);
    let mut conversion = None;
    if let Some(after) = rest.strip_prefix('!') {
        conversion = after.chars().next();
        rest = &after[conversion.map_or(0, char::len_utf8)..];
        if !rest.is_empty() && !rest.starts_with(':') {
            return fault("expected ':' after conversion specifier");
        }
    }
    let value = format_path(run, path, args, automatic)?;
    let spec = match rest.strip_prefix(':') {
        Some(spec) => format_fields(run, &Str::from(spec), args, automatic, depth + 1)?.text,
        None => String::new(),
    };
    let origin = origin_of(&value, &run.budget);
    let value = match conversion {
        None => value,
        Some('s') => Value::Str(value.to_str(&mut run.budget)?),
        Some('r') => Value::from(&*value.repr(&mut run.budget)?),
        Some('a') => Value::from(&*ascii(&value.repr(&mut run.budget)?)),
        Some(c) => return fault(format!("Unknown conversion specifier '{c}'")),
    };
    Ok((format_value(&value, &spec, &mut run.budget)?, origin))
}

/// ascii(): what is not ASCII in a repr, escaped.
fn ascii(repr: &str) -> String {
    let mut out = String::with_capacity(repr.len());
    for c in repr.chars() {
        match c as u32 {
            0..0x80 => out.push(c),
            n @ 0x80..0x100 => out.push_str(&format!("\\x{n:02x}")),
            n @ 0x100..0x10000 => out.push_str(&format!("\\u{n:04x}")),
            n => out.push_str(&format!("\\U{n:08x}")),
        }
    }
    out
}

fn format_path(
    run: &mut Run<'_>,
    path: &str,
    args: &CallArgs,
    automatic: &mut Option<usize>,
) -> Res<Value> {
    let end = path.find(['.', '[']).unwrap_or(path.len());
    let (first, mut rest) = path.split_at(end);
    let mixed = "cannot switch from manual field specification to automatic field numbering";
    let positional = |at: usize| match args.positional.get(at) {
        Some(value) => Ok(value.clone()),
        None => fault(format!(
            "Replacement index {at} out of range for positional args tuple"
        )),
    };
    let mut value = match (path.is_empty(), automatic.as_mut()) {
        (true, Some(next)) => {
            *next += 1;
            positional(*next - 1)?
        }
        (true, None) => return fault(mixed),
        (false, next) => match first.parse() {
            Ok(at) => {
                // A number with a path behind it does not count as manual numbering in Python either.
                if rest.is_empty() {
                    if next.is_some_and(|n| *n > 0) {
                        return fault(mixed);
                    }
                    *automatic = None;
                }
                positional(at)?
            }
            Err(_) => match args.named.iter().find(|(n, _)| **n == *first) {
                Some((_, value)) => value.clone(),
                None => return fault(format!("'{first}'")),
            },
        },
    };
    while !rest.is_empty() {
        if let Some(after) = rest.strip_prefix('.') {
            let end = after.find(['.', '[']).unwrap_or(after.len());
            value = run.attribute_named(&value, &after[..end].into())?;
            rest = &after[end..];
        } else if let Some((key, after)) = rest.strip_prefix('[').and_then(|r| r.split_once(']')) {
            let key = key.parse().map_or_else(|_| Value::from(key), Value::Int);
            value = run.item(&value, &key)?;
            rest = after;
        } else {
            return fault("Only '.' or '[' may follow ']' in format field specifier");
        }
    }
    Ok(value)
}

/// How `tojson` writes: json.dumps' arguments.
pub(super) struct Json {
    pub indent: Option<String>,
    pub item_separator: Cow<'static, str>,
    pub key_separator: Cow<'static, str>,
    pub sort_keys: bool,
    pub ensure_ascii: bool,
}

impl Json {
    pub fn write(
        &self,
        value: &Value,
        level: usize,
        out: &mut Text,
        budget: &mut Budget,
    ) -> Res<()> {
        budget.bytes(8)?;
        match value {
            Value::None => out.own("null"),
            Value::Bool(true) => out.own("true"),
            Value::Bool(false) => out.own("false"),
            Value::Int(i) => out.made(&i.to_string(), &budget.unsure()),
            Value::Big(digits) => out.made(digits, &budget.unsure()),
            Value::Float(f) => out.made(&json_float(*f), &budget.unsure()),
            Value::Str(s) => {
                budget.bytes(s.text.len())?;
                self.string(s, out, budget)?;
            }
            Value::List(s) | Value::Tuple(s) => {
                self.bracketed(
                    ('[', ']'),
                    &s.items,
                    level,
                    out,
                    budget,
                    |json, item, out, budget| json.write(item, level + 1, out, budget),
                )?;
            }
            Value::Dict(d) if self.sort_keys => {
                let mut entries: Vec<_> = d.entries.iter().collect();
                super::filters::sort_by(&mut entries, |a, b| a.0.compare(&b.0, "<", budget))?;
                self.bracketed(
                    ('{', '}'),
                    &entries,
                    level,
                    out,
                    budget,
                    |json, e, out, budget| json.entry(e, level, out, budget),
                )?;
            }
            Value::Dict(d) => {
                self.bracketed(
                    ('{', '}'),
                    &d.entries,
                    level,
                    out,
                    budget,
                    |json, e, out, budget| json.entry(e, level, out, budget),
                )?;
            }
            other => {
                return fault(format!(
                    "Object of type {} is not JSON serializable",
                    other.type_name()
                ));
            }
        }
        Ok(())
    }

    fn entry(
        &self,
        (key, value): &(Value, Value),
        level: usize,
        out: &mut Text,
        budget: &mut Budget,
    ) -> Res<()> {
        match key {
            Value::Str(key) => self.string(key, out, budget)?,
            key => self.string(&json_key(key, budget)?, out, budget)?,
        }
        out.own(&self.key_separator);
        self.write(value, level + 1, out, budget)
    }

    fn bracketed<T>(
        &self,
        (open, close): (char, char),
        items: &[T],
        level: usize,
        out: &mut Text,
        budget: &mut Budget,
        mut write: impl FnMut(&Json, &T, &mut Text, &mut Budget) -> Res<()>,
    ) -> Res<()> {
        out.text.push(open);
        for (i, item) in items.iter().enumerate() {
            if i > 0 {
                out.own(&self.item_separator);
            }
            self.new_line(level + 1, out, budget)?;
            write(self, item, out, budget)?;
        }
        if !items.is_empty() {
            self.new_line(level, out, budget)?;
        }
        out.text.push(close);
        Ok(())
    }

    fn new_line(&self, level: usize, out: &mut Text, budget: &mut Budget) -> Res<()> {
        if let Some(indent) = &self.indent {
            budget.bytes(indent.len() * level + 1)?;
            out.own("\n");
            for _ in 0..level {
                out.own(indent);
            }
        }
        Ok(())
    }

    fn string(&self, s: &Str, out: &mut Text, budget: &mut Budget) -> Res<()> {
        out.own("\"");
        let text = &*s.text;
        let mut copied = 0;
        let special = |b: u8| b < 0x20 || b == b'"' || b == b'\\' || self.ensure_ascii && b >= 0x7f;
        while let Some(found) = text.as_bytes()[copied..].iter().position(|b| special(*b)) {
            let at = copied + found;
            out.part(s, copied..at);
            let Some(c) = text[at..].chars().next() else {
                break;
            };
            copied = at + c.len_utf8();
            if c == '\u{7f}' {
                out.part(s, at..copied);
                continue;
            }
            // Text that is escaped again and again grows without bound: each escape is paid for.
            budget.bytes(12)?;
            let simple = match c {
                '"' => "\\\"",
                '\\' => "\\\\",
                '\n' => "\\n",
                '\r' => "\\r",
                '\t' => "\\t",
                '\u{8}' => "\\b",
                '\u{c}' => "\\f",
                _ => "",
            };
            let origin = match &s.origin {
                None => None,
                Some(_) => s.part(at..copied).origin,
            };
            match simple {
                "" => out.made(&escaped_units(c), &origin),
                simple => out.made(simple, &origin),
            }
        }
        out.part(s, copied..text.len());
        out.own("\"");
        Ok(())
    }
}

/// A character as JSON escapes it by number.
fn escaped_units(c: char) -> String {
    let units = c.encode_utf16(&mut [0; 2]).to_vec();
    units.iter().map(|unit| format!("\\u{unit:04x}")).collect()
}

fn json_float(f: f64) -> String {
    match f {
        f if f.is_nan() => "NaN".into(),
        f if f.is_infinite() => (if f > 0.0 { "Infinity" } else { "-Infinity" }).into(),
        f => float_repr(f),
    }
}

fn json_key(key: &Value, budget: &Budget) -> Res<Str> {
    let text = match key {
        Value::Big(digits) => digits.to_string(),
        Value::None => "null".into(),
        Value::Bool(b) => b.to_string(),
        Value::Int(i) => i.to_string(),
        Value::Float(f) => json_float(*f),
        other => {
            return fault(format!(
                "keys must be str, int, float, bool or None, not {}",
                other.type_name()
            ));
        }
    };
    Ok(Str {
        text: text.into(),
        markup: false,
        origin: budget.unsure(),
    })
}

/// The place of `key` in `len` items, for methods that take indices.
pub(super) fn bound(key: Option<&Value>, len: usize, default: usize) -> usize {
    match key.and_then(Value::as_int) {
        None => default,
        Some(_) if len == 0 => 0,
        Some(i) if i < 0 => index(&Value::Int(i), len).unwrap_or(0),
        Some(i) => usize::try_from(i).unwrap_or(len).min(len),
    }
}
