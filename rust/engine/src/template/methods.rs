//! The methods of Python's str, list, dict, numbers and Jinja2's loop that templates may call.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::format::{bound, format_method};
use super::globals::Builtin;
use super::origin::{Str, Text};
use super::run::{CallArgs, Run};
use super::text;
use super::value::{Budget, Dict, Res, Value, fault, is_printable};

const STR: u16 = 1 << 0;
const SEQUENCE: u16 = 1 << 1;
const LIST: u16 = 1 << 2;
const DICT: u16 = 1 << 3;
const INT: u16 = 1 << 4;
const FLOAT: u16 = 1 << 5;
const LOOP: u16 = 1 << 6;
const CYCLER: u16 = 1 << 7;
const DICT_CLASS: u16 = 1 << 8;

/// Every method, in order of names, and what has it.
static METHODS: &[(&str, u16)] = &[
    ("bit_count", INT),
    ("bit_length", INT),
    ("capitalize", STR),
    ("casefold", STR),
    ("center", STR),
    ("changed", LOOP),
    ("conjugate", INT | FLOAT),
    ("copy", LIST | DICT),
    ("count", STR | SEQUENCE | LIST),
    ("cycle", LOOP),
    ("endswith", STR),
    ("expandtabs", STR),
    ("find", STR),
    ("format", STR),
    ("format_map", STR),
    ("fromkeys", DICT | DICT_CLASS),
    ("get", DICT),
    ("index", STR | SEQUENCE | LIST),
    ("is_integer", INT | FLOAT),
    ("isalnum", STR),
    ("isalpha", STR),
    ("isascii", STR),
    ("isdecimal", STR),
    ("isdigit", STR),
    ("isidentifier", STR),
    ("islower", STR),
    ("isnumeric", STR),
    ("isprintable", STR),
    ("isspace", STR),
    ("istitle", STR),
    ("isupper", STR),
    ("items", DICT),
    ("join", STR),
    ("keys", DICT),
    ("ljust", STR),
    ("lower", STR),
    ("lstrip", STR),
    ("next", CYCLER),
    ("partition", STR),
    ("removeprefix", STR),
    ("removesuffix", STR),
    ("replace", STR),
    ("reset", CYCLER),
    ("rfind", STR),
    ("rindex", STR),
    ("rjust", STR),
    ("rpartition", STR),
    ("rsplit", STR),
    ("rstrip", STR),
    ("split", STR),
    ("splitlines", STR),
    ("startswith", STR),
    ("strip", STR),
    ("swapcase", STR),
    ("title", STR),
    ("translate", STR),
    ("upper", STR),
    ("values", DICT),
    ("zfill", STR),
];

/// A method by its place in `METHODS`.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(super) struct Method(u8);

impl Method {
    pub fn named(name: &str) -> Option<Method> {
        let at = METHODS.binary_search_by(|(n, _)| (*n).cmp(name)).ok()?;
        u8::try_from(at).ok().map(Method)
    }

    pub fn name(self) -> &'static str {
        METHODS[usize::from(self.0)].0
    }

    /// Do values of this type have it?
    pub fn of(self, object: &Value) -> bool {
        let kind = match object {
            Value::Str(_) => STR,
            Value::List(_) => LIST,
            Value::Tuple(_) | Value::Range(_) => SEQUENCE,
            Value::Dict(_) => DICT,
            Value::Int(_) | Value::Bool(_) | Value::Big(_) => INT,
            Value::Float(_) => FLOAT,
            Value::Loop(_) => LOOP,
            Value::Cycler(_) => CYCLER,
            Value::Function(Builtin::Dict) => DICT_CLASS,
            _ => 0,
        };
        METHODS[usize::from(self.0)].1 & kind != 0
    }
}

/// Methods that change their object: the sandbox refuses them.
const LIST_CHANGES: &[&str] = &[
    "append", "clear", "extend", "insert", "pop", "remove", "reverse", "sort",
];
const DICT_CHANGES: &[&str] = &["clear", "pop", "popitem", "setdefault", "update"];

/// Does the sandbox hide this attribute?
pub(super) fn is_unsafe(object: &Value, name: &str) -> bool {
    match object {
        Value::List(_) if LIST_CHANGES.contains(&name) => true,
        Value::Dict(_) if DICT_CHANGES.contains(&name) => true,
        Value::Dict(d) => name.starts_with("__") && d.get_str(name).is_none(),
        _ => name.starts_with("__"),
    }
}

/// Methods that take arguments by name; others take them by place alone.
const TAKES_NAMES: &[&str] = &[
    "changed",
    "cycle",
    "expandtabs",
    "format",
    "rsplit",
    "split",
    "splitlines",
];

pub(super) fn call(
    run: &mut Run<'_>,
    object: &Value,
    method: Method,
    mut args: CallArgs,
) -> Res<Value> {
    let name = method.name();
    if !args.named.is_empty() && !TAKES_NAMES.contains(&name) {
        let owner = object.type_name();
        return fault(format!("{owner}.{name}() takes no keyword arguments"));
    }
    for arg in &mut args.positional {
        run.settle(arg)?;
    }
    match object {
        Value::Str(s) if name == "format" => format_method(run, s, &args),
        Value::Str(s) if name == "format_map" => {
            let [mapping] = args.bind(name, ["mapping"])?;
            let Some(Value::Dict(mapping)) = mapping else {
                return fault("format_map() argument must be a dict");
            };
            let mut named = Vec::new();
            for (key, value) in &mapping.entries {
                if let Value::Str(key) = key {
                    run.budget.bytes(size_of::<Value>())?;
                    named.push((key.text.clone(), value.clone()));
                }
            }
            let args = CallArgs {
                positional: Vec::new(),
                named,
            };
            format_method(run, s, &args)
        }
        Value::Str(s) => str_method(s, name, args, &mut run.budget),
        Value::Dict(_) | Value::Function(Builtin::Dict) if name == "fromkeys" => {
            from_keys(args, &mut run.budget)
        }
        Value::Dict(d) => dict_method(object, d, name, args, &mut run.budget),
        Value::List(s) | Value::Tuple(s) => {
            sequence_method(object, &s.items, name, args, &mut run.budget)
        }
        Value::Range(_) => {
            let items = object.items(&mut run.budget)?;
            sequence_method(object, &items, name, args, &mut run.budget)
        }
        Value::Float(f) => Ok(match name {
            "is_integer" => Value::Bool(f.fract() == 0.0),
            _ => Value::Float(*f),
        }),
        Value::Loop(_) | Value::Cycler(_) => loop_method(object, name, args, &mut run.budget),
        Value::Big(_) if name != "conjugate" => {
            fault(format!("{name}() of an integer beyond 128 bits"))
        }
        Value::Big(_) => Ok(object.clone()),
        other => {
            let size = other.as_int().unwrap_or(0).unsigned_abs();
            Ok(match name {
                "bit_length" => Value::Int((128 - size.leading_zeros()).into()),
                "bit_count" => Value::Int(size.count_ones().into()),
                "is_integer" => Value::Bool(true),
                _ => Value::Int(other.as_int().unwrap_or(0)),
            })
        }
    }
}

fn loop_method(object: &Value, name: &str, args: CallArgs, budget: &mut Budget) -> Res<Value> {
    match (object, name) {
        (Value::Loop(state), "cycle") => {
            if args.positional.is_empty() {
                return fault("no items for cycling given");
            }
            let at = state.index() % args.positional.len();
            Ok(args.positional[at].clone())
        }
        (Value::Loop(state), _) => {
            let mut last = state.changed.lock().unwrap_or_else(PoisonError::into_inner);
            let now = Value::tuple(args.positional.clone(), budget)?;
            let before = last.replace(args.positional);
            let Some(before) = before else {
                return Ok(Value::Bool(true));
            };
            let before = Value::tuple(before, budget)?;
            Ok(Value::Bool(!now.equals(&before, budget)?))
        }
        (Value::Cycler(c), "next") => {
            let at = c.used.load(Ordering::Relaxed);
            c.used
                .store((at + 1) % c.items.items.len().max(1), Ordering::Relaxed);
            Ok(c.items.items.get(at).cloned().unwrap_or(Value::None))
        }
        (Value::Cycler(c), _) => {
            c.used.store(0, Ordering::Relaxed);
            Ok(Value::None)
        }
        _ => fault("no such method"),
    }
}

fn sequence_method(
    object: &Value,
    items: &[Value],
    name: &str,
    args: CallArgs,
    budget: &mut Budget,
) -> Res<Value> {
    if name == "copy" {
        return Ok(object.clone());
    }
    let [needle, start, stop] = args.bind(name, ["value", "start", "stop"])?;
    if name == "count" && start.is_some() {
        return fault("count() takes exactly one argument");
    }
    check_indices([&start, &stop])?;
    let Some(needle) = needle else {
        return fault(format!("{name}() takes exactly one argument (0 given)"));
    };
    let (from, to) = (
        bound(start.as_ref(), items.len(), 0),
        bound(stop.as_ref(), items.len(), items.len()),
    );
    let mut count = 0;
    for (i, item) in items.iter().enumerate().take(to).skip(from) {
        if item.equals(&needle, budget)? {
            if name == "index" {
                return Ok(Value::int(i));
            }
            count += 1;
        }
    }
    if name == "index" {
        let needle = needle.repr(budget)?;
        return fault(format!("{needle} is not in {}", object.type_name()));
    }
    Ok(Value::int(count))
}

fn from_keys(args: CallArgs, budget: &mut Budget) -> Res<Value> {
    let [keys, value] = args.bind("fromkeys", ["iterable", "value"])?;
    let value = value.unwrap_or(Value::None);
    let keys = keys.unwrap_or(Value::None).items(budget)?;
    Value::dict(
        keys.into_iter().map(|k| (k, value.clone())).collect(),
        budget,
    )
}

fn dict_method(
    object: &Value,
    dict: &Dict,
    name: &str,
    args: CallArgs,
    budget: &mut Budget,
) -> Res<Value> {
    if name == "get" {
        let [key, default] = args.bind(name, ["key", "default"])?;
        let Some(key) = key else {
            return fault("get expected at least 1 argument, got 0");
        };
        let found = dict.get(&key, budget)?.cloned();
        return Ok(found.or(default).unwrap_or(Value::None));
    }
    let [] = args.bind(name, [])?;
    let entries = dict.entries.iter();
    match name {
        "keys" => Value::view(
            "dict_keys",
            entries.map(|(k, _)| k.clone()).collect(),
            budget,
        ),
        "values" => Value::view(
            "dict_values",
            entries.map(|(_, v)| v.clone()).collect(),
            budget,
        ),
        "items" => Value::view("dict_items", pairs(dict, budget)?, budget),
        _ => Ok(object.clone()),
    }
}

/// A dict's entries as tuples.
pub(super) fn pairs(dict: &Dict, budget: &mut Budget) -> Res<Vec<Value>> {
    dict.entries
        .iter()
        .map(|(k, v)| Value::tuple(vec![k.clone(), v.clone()], budget))
        .collect()
}

/// An argument that must be a string.
fn wanted(value: Option<Value>, method: &str) -> Res<Str> {
    match value {
        Some(Value::Str(s)) => Ok(s),
        Some(other) => fault(format!(
            "{method}() argument must be str, not {}",
            other.type_name()
        )),
        None => fault(format!("{method}() takes at least 1 argument (0 given)")),
    }
}

fn str_method(s: &Str, name: &str, args: CallArgs, budget: &mut Budget) -> Res<Value> {
    budget.bytes(s.text.len())?;
    let t = &*s.text;
    let same = |text: String| Value::Str(s.made_into(text));
    match name {
        "capitalize" | "casefold" | "lower" | "upper" | "title" | "swapcase" => {
            let [] = args.bind(name, [])?;
            Ok(same(match name {
                "capitalize" => text::capitalize(t),
                "casefold" => text::casefold(t),
                "lower" => t.to_lowercase(),
                "upper" => t.to_uppercase(),
                "title" => text::title(t),
                _ => text::swapcase(t),
            }))
        }
        "strip" | "lstrip" | "rstrip" => strip(s, name, args),
        "split" | "rsplit" => split(s, name, args, budget),
        "splitlines" => {
            let [keep] = args.bind(name, ["keepends"])?;
            let keep = keep.is_some_and(|k| k.truth());
            pieces(text::lines(t, keep), s, budget)
        }
        "partition" | "rpartition" => partition(s, name, args, budget),
        "startswith" | "endswith" => affix(t, name, args, budget),
        "find" | "rfind" | "index" | "rindex" | "count" => search(t, name, args),
        "replace" => {
            let [old, new, count] = args.bind(name, ["old", "new", "count"])?;
            let (old, new) = (wanted(old, name)?, wanted(new, name)?);
            replace(s, &old, &new, count.as_ref(), budget)
        }
        "join" => {
            let [items] = args.bind(name, ["iterable"])?;
            join(s, &items.unwrap_or(Value::None).items(budget)?, budget)
        }
        "center" | "ljust" | "rjust" | "zfill" => pad(s, name, args, budget),
        "removeprefix" | "removesuffix" => {
            let [affix] = args.bind(name, ["affix"])?;
            let affix = wanted(affix, name)?;
            let left = match name {
                "removeprefix" => t.strip_prefix(&*affix.text),
                _ => t.strip_suffix(&*affix.text),
            };
            Ok(Value::Str(s.slice(left.unwrap_or(t))))
        }
        "expandtabs" => expand_tabs(s, args, budget),
        "translate" => translate(s, args, budget),
        _ => {
            let [] = args.bind(name, [])?;
            Ok(Value::Bool(str_is(t, name)))
        }
    }
}

fn str_is(t: &str, name: &str) -> bool {
    let all = |test: &dyn Fn(char) -> bool| !t.is_empty() && t.chars().all(test);
    match name {
        "isalpha" => all(&char::is_alphabetic),
        "isalnum" => all(&char::is_alphanumeric),
        "isascii" => t.is_ascii(),
        "isdecimal" => all(&|c| text::decimal(c).is_some()),
        "isdigit" => all(&text::is_digit),
        "isnumeric" => all(&char::is_numeric),
        "isspace" => all(&text::is_space),
        "isprintable" => t.chars().all(is_printable),
        "islower" => is_lower(t),
        "isupper" => {
            t.chars().any(text::is_upper)
                && !t.chars().any(|c| text::is_cased(c) && !text::is_upper(c))
        }
        "istitle" => text::is_title(t),
        // isidentifier
        _ => {
            let mut chars = t.chars();
            // Marks may follow, joiners may not.
            let follows = |c: char| {
                regex_syntax::try_is_word_character(c).unwrap_or(c.is_alphanumeric())
                    && !matches!(c, '\u{200c}' | '\u{200d}')
            };
            chars.next().is_some_and(|c| c == '_' || c.is_alphabetic()) && chars.all(follows)
        }
    }
}

pub(super) fn is_lower(t: &str) -> bool {
    t.chars().any(char::is_lowercase) && !t.chars().any(|c| text::is_cased(c) && !c.is_lowercase())
}

/// A list of parts of `s`.
fn pieces(parts: Vec<&str>, s: &Str, budget: &mut Budget) -> Res<Value> {
    let items = parts
        .into_iter()
        .map(|part| Value::Str(s.slice(part)))
        .collect();
    Value::list(items, budget)
}

fn strip(s: &Str, name: &str, args: CallArgs) -> Res<Value> {
    let [chars] = args.bind(name, ["chars"])?;
    let chars = match chars {
        None | Some(Value::None) => None,
        given => Some(wanted(given, name)?),
    };
    let left = stripped(&s.text, name, chars.as_ref().map(|c| &*c.text));
    Ok(Value::Str(s.slice(left)))
}

/// strip, lstrip or rstrip.
pub(super) fn stripped<'t>(mut t: &'t str, name: &str, chars: Option<&str>) -> &'t str {
    let cut = |c: char| chars.map_or_else(|| text::is_space(c), |set| set.contains(c));
    if name != "rstrip" {
        t = t.trim_start_matches(cut);
    }
    if name != "lstrip" {
        t = t.trim_end_matches(cut);
    }
    t
}

fn split(s: &Str, name: &str, args: CallArgs, budget: &mut Budget) -> Res<Value> {
    let [separator, limit] = args.bind(name, ["sep", "maxsplit"])?;
    let limit = match limit.as_ref().map(|l| l.as_int()) {
        None => usize::MAX - 1,
        Some(Some(l)) if i64::try_from(l).is_err() => {
            return fault("Python int too large to convert to C ssize_t");
        }
        Some(Some(l)) => usize::try_from(l)
            .unwrap_or(usize::MAX - 1)
            .min(usize::MAX - 1),
        Some(None) => return fault("maxsplit must be an integer"),
    };
    let t = &*s.text;
    let parts: Vec<&str> = match separator {
        None | Some(Value::None) if name == "split" => text::words(t, limit),
        None | Some(Value::None) => text::words_from_end(t, limit),
        given => {
            let separator = wanted(given, name)?;
            if separator.text.is_empty() {
                return fault("empty separator");
            }
            match name {
                "split" => t.splitn(limit + 1, &*separator.text).collect(),
                _ => {
                    let mut parts: Vec<&str> = t.rsplitn(limit + 1, &*separator.text).collect();
                    parts.reverse();
                    parts
                }
            }
        }
    };
    pieces(parts, s, budget)
}

fn partition(s: &Str, name: &str, args: CallArgs, budget: &mut Budget) -> Res<Value> {
    let [separator] = args.bind(name, ["sep"])?;
    let separator = wanted(separator, name)?;
    if separator.text.is_empty() {
        return fault("empty separator");
    }
    let t = &*s.text;
    let found = if name == "partition" {
        t.find(&*separator.text)
    } else {
        t.rfind(&*separator.text)
    };
    let end = t.len();
    let parts = match (found, name) {
        (Some(at), _) => [
            0..at,
            at..at + separator.text.len(),
            at + separator.text.len()..end,
        ],
        (None, "partition") => [0..end, end..end, end..end],
        (None, _) => [0..0, 0..0, 0..end],
    };
    Value::tuple(
        parts
            .into_iter()
            .map(|range| Value::Str(s.part(range)))
            .collect(),
        budget,
    )
}

/// The part of `t` between two optional indices of characters, and where it starts (in characters).
/// None where the start lies beyond the end.
fn window<'t>(t: &'t str, start: Option<&Value>, stop: Option<&Value>) -> Option<(&'t str, usize)> {
    if start.is_none() && stop.is_none() {
        return Some((t, 0));
    }
    let len = t.chars().count();
    if start
        .and_then(Value::as_int)
        .is_some_and(|i| i > len as i128)
    {
        return None;
    }
    let (from, to) = (bound(start, len, 0), bound(stop, len, len));
    let byte = |i: usize| t.char_indices().nth(i).map_or(t.len(), |(at, _)| at);
    (from <= to).then(|| (&t[byte(from)..byte(to)], from))
}

/// Places in a text or a list: integers or None.
fn check_indices(indices: [&Option<Value>; 2]) -> Res<()> {
    let fits = |v: &Value| matches!(v, Value::None | Value::Big(_)) || v.as_int().is_some();
    match indices.into_iter().flatten().all(fits) {
        true => Ok(()),
        false => fault("slice indices must be integers or None or have an __index__ method"),
    }
}

fn affix(t: &str, name: &str, args: CallArgs, budget: &mut Budget) -> Res<Value> {
    let [affixes, start, stop] = args.bind(name, ["prefix", "start", "end"])?;
    check_indices([&start, &stop])?;
    let affixes = match affixes {
        Some(Value::Tuple(tuple)) => tuple.items.clone(),
        other => vec![Value::Str(wanted(other, name)?)],
    };
    budget.steps(affixes.len())?;
    let Some((t, _)) = window(t, start.as_ref(), stop.as_ref()) else {
        return Ok(Value::Bool(false));
    };
    for affix in affixes {
        let affix = wanted(Some(affix), name)?;
        let fits = if name == "startswith" {
            t.starts_with(&*affix.text)
        } else {
            t.ends_with(&*affix.text)
        };
        if fits {
            return Ok(Value::Bool(true));
        }
    }
    Ok(Value::Bool(false))
}

fn search(t: &str, name: &str, args: CallArgs) -> Res<Value> {
    let [needle, start, stop] = args.bind(name, ["sub", "start", "end"])?;
    check_indices([&start, &stop])?;
    let needle = wanted(needle, name)?;
    let window = window(t, start.as_ref(), stop.as_ref());
    if name == "count" {
        return Ok(Value::int(match window {
            None => 0,
            Some((t, _)) if needle.text.is_empty() => t.chars().count() + 1,
            Some((t, _)) => t.matches(&*needle.text).count(),
        }));
    }
    let found = window.and_then(|(t, from)| {
        let at = if name.starts_with('r') {
            t.rfind(&*needle.text)
        } else {
            t.find(&*needle.text)
        };
        at.map(|at| from + t[..at].chars().count())
    });
    match (found, name) {
        (Some(at), _) => Ok(Value::int(at)),
        (None, "find" | "rfind") => Ok(Value::Int(-1)),
        (None, _) => fault("substring not found"),
    }
}

/// str.replace, paid for before it is made.
pub(super) fn replace(
    s: &Str,
    old: &Str,
    new: &Str,
    count: Option<&Value>,
    budget: &mut Budget,
) -> Res<Value> {
    let limit = match count {
        None => usize::MAX,
        Some(n) => match n.as_int() {
            Some(n) if i64::try_from(n).is_err() => {
                return fault("Python int too large to convert to C ssize_t");
            }
            Some(n) => usize::try_from(n).unwrap_or(usize::MAX),
            None => return fault("count must be an integer"),
        },
    };
    let hits = s.text.matches(&*old.text).take(limit).count();
    if hits == 0 {
        return Ok(Value::Str(s.clone()));
    }
    budget.bytes(s.text.len() + hits.saturating_mul(new.text.len()))?;
    let mut out = Text::with_capacity(s.text.len());
    let mut at = 0;
    for (hit, old) in s.text.match_indices(&*old.text).take(limit) {
        out.part(s, at..hit);
        match s.markup && !new.markup {
            true => out.made(&super::value::html_escape(&new.text), &new.origin),
            false => out.str(new),
        }
        at = hit + old.len();
    }
    out.part(s, at..s.text.len());
    Ok(Value::Str(out.finish(s.markup)))
}

fn join(s: &Str, items: &[Value], budget: &mut Budget) -> Res<Value> {
    let mut out = Text::default();
    for (i, item) in items.iter().enumerate() {
        let Value::Str(text) = item else {
            return fault(format!(
                "sequence item {i}: expected str instance, {} found",
                item.type_name()
            ));
        };
        if i > 0 {
            budget.bytes(s.text.len())?;
            out.str(s);
        }
        budget.bytes(text.text.len())?;
        match s.markup && !text.markup {
            true => out.made(&super::value::html_escape(&text.text), &text.origin),
            false => out.str(text),
        }
    }
    Ok(Value::Str(out.finish(s.markup)))
}

pub(super) fn pad(s: &Str, name: &str, args: CallArgs, budget: &mut Budget) -> Res<Value> {
    let [width, fill] = args.bind(name, ["width", "fillchar"])?;
    let Some(width) = width.as_ref().and_then(Value::as_int) else {
        return fault(format!("{name}() needs an integer width"));
    };
    let fill = match fill {
        None => Str::from(" "),
        given => wanted(given, name)?,
    };
    let (fill, fill_origin) = (fill.text, fill.origin);
    if fill.chars().count() != 1 {
        return fault("The fill character must be exactly one character long");
    }
    let t = &*s.text;
    let missing = usize::try_from(width)
        .unwrap_or(0)
        .saturating_sub(t.chars().count());
    budget.bytes(t.len().saturating_add(missing.saturating_mul(fill.len())))?;
    let fills = |n: usize| fill.repeat(n);
    let mut out = Text::default();
    match name {
        "ljust" => {
            out.str(s);
            out.made(&fills(missing), &fill_origin);
        }
        "rjust" => {
            out.made(&fills(missing), &fill_origin);
            out.str(s);
        }
        "center" => {
            // CPython puts the odd one left when width is odd.
            let left = missing / 2 + (missing & usize::try_from(width).unwrap_or(0) & 1);
            out.made(&fills(left), &fill_origin);
            out.str(s);
            out.made(&fills(missing - left), &fill_origin);
        }
        _ => {
            let sign = t.len() - t.strip_prefix(['+', '-']).unwrap_or(t).len();
            out.part(s, 0..sign);
            out.own(&"0".repeat(missing));
            out.part(s, sign..t.len());
        }
    }
    Ok(Value::Str(out.finish(s.markup)))
}

fn expand_tabs(s: &Str, args: CallArgs, budget: &mut Budget) -> Res<Value> {
    let [size] = args.bind("expandtabs", ["tabsize"])?;
    let size = usize::try_from(size.as_ref().and_then(Value::as_int).unwrap_or(8)).unwrap_or(0);
    let tabs = s.text.matches('\t').count();
    budget.bytes(s.text.len().saturating_add(tabs.saturating_mul(size)))?;
    let (mut out, mut column) = (String::new(), 0);
    for c in s.text.chars() {
        match c {
            '\t' if size > 0 => {
                let gap = size - column % size;
                out.push_str(&" ".repeat(gap));
                column += gap;
            }
            '\t' => {}
            c => {
                column = if matches!(c, '\n' | '\r') {
                    0
                } else {
                    column + 1
                };
                out.push(c);
            }
        }
    }
    Ok(Value::Str(s.made_into(out)))
}

fn translate(s: &Str, args: CallArgs, budget: &mut Budget) -> Res<Value> {
    let [table] = args.bind("translate", ["table"])?;
    let Some(Value::Dict(table)) = table else {
        return fault("translate() argument must be a dict");
    };
    let mut out = Text::default();
    for (i, c) in s.text.char_indices() {
        match table.get(&Value::Int((c as u32).into()), budget)? {
            None => out.part(s, i..i + c.len_utf8()),
            Some(Value::None) => {}
            Some(Value::Str(with)) => {
                budget.bytes(with.text.len())?;
                out.str(with);
            }
            Some(other) => match other
                .as_int()
                .and_then(|i| u32::try_from(i).ok())
                .and_then(char::from_u32)
            {
                Some(c) => out.made(&c.to_string(), &budget.unsure()),
                None => return fault("character mapping must return integer, None or str"),
            },
        }
    }
    Ok(Value::Str(out.finish(s.markup)))
}
