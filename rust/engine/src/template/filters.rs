//! Jinja2's filters, with transformers' own in their place: which there are, and the general ones.

mod number;
mod pretty;
pub(super) mod sequence;
mod text;
mod web;

use std::borrow::Cow;

use super::format::Json;
use super::methods::{self, Method};
use super::origin::Text;
use super::run::{CallArgs, Run};
use super::value::{Budget, Res, Value, fault};

pub(super) use sequence::sort_by;

/// What a filter is: the value before the bar, and the arguments.
pub(super) type Filter = fn(&mut Run<'_>, Value, CallArgs) -> Res<Value>;

/// The filter of this name. None is an error, but only where it is reached.
pub(super) fn named(name: &str) -> Option<Filter> {
    let at = FILTERS.binary_search_by(|(n, _)| (*n).cmp(name)).ok()?;
    Some(FILTERS[at].1)
}

pub(super) fn unknown<T>(name: &str) -> Res<T> {
    fault(format!("No filter named '{name}'."))
}

/// Every filter, in order of names.
static FILTERS: &[(&str, Filter)] = &[
    ("abs", |r, v, a| number::filter(r, "abs", &v, a)),
    ("attr", attr),
    ("batch", |r, v, a| sequence::filter(r, "batch", v, a)),
    ("capitalize", |r, v, a| text::filter(r, "capitalize", &v, a)),
    ("center", |r, v, a| text::filter(r, "center", &v, a)),
    ("count", length),
    ("d", default),
    ("default", default),
    ("dictsort", |r, v, a| sequence::filter(r, "dictsort", v, a)),
    ("e", |r, v, a| web::filter(r, "e", &v, a)),
    ("escape", |r, v, a| web::filter(r, "escape", &v, a)),
    ("filesizeformat", |r, v, a| {
        number::filter(r, "filesizeformat", &v, a)
    }),
    ("first", |r, v, a| sequence::filter(r, "first", v, a)),
    ("float", |r, v, a| number::filter(r, "float", &v, a)),
    ("forceescape", |r, v, a| {
        web::filter(r, "forceescape", &v, a)
    }),
    ("format", |r, v, a| text::filter(r, "format", &v, a)),
    ("groupby", |r, v, a| sequence::filter(r, "groupby", v, a)),
    ("indent", |r, v, a| text::filter(r, "indent", &v, a)),
    ("int", |r, v, a| number::filter(r, "int", &v, a)),
    ("items", items),
    ("join", |r, v, a| sequence::filter(r, "join", v, a)),
    ("last", |r, v, a| sequence::filter(r, "last", v, a)),
    ("length", length),
    ("list", |r, v, a| sequence::filter(r, "list", v, a)),
    ("lower", |r, v, a| text::filter(r, "lower", &v, a)),
    ("map", |r, v, a| sequence::filter(r, "map", v, a)),
    ("max", |r, v, a| sequence::filter(r, "max", v, a)),
    ("min", |r, v, a| sequence::filter(r, "min", v, a)),
    ("pprint", pretty::pprint),
    ("random", |r, v, a| sequence::filter(r, "random", v, a)),
    ("reject", |r, v, a| sequence::filter(r, "reject", v, a)),
    ("rejectattr", |r, v, a| {
        sequence::filter(r, "rejectattr", v, a)
    }),
    ("replace", |r, v, a| text::filter(r, "replace", &v, a)),
    ("reverse", |r, v, a| sequence::filter(r, "reverse", v, a)),
    ("round", |r, v, a| number::filter(r, "round", &v, a)),
    ("safe", |r, v, a| web::filter(r, "safe", &v, a)),
    ("select", |r, v, a| sequence::filter(r, "select", v, a)),
    ("selectattr", |r, v, a| {
        sequence::filter(r, "selectattr", v, a)
    }),
    ("slice", |r, v, a| sequence::filter(r, "slice", v, a)),
    ("sort", |r, v, a| sequence::filter(r, "sort", v, a)),
    ("string", |r, v, a| web::filter(r, "string", &v, a)),
    ("striptags", |r, v, a| web::filter(r, "striptags", &v, a)),
    ("sum", |r, v, a| sequence::filter(r, "sum", v, a)),
    ("title", |r, v, a| text::filter(r, "title", &v, a)),
    ("tojson", to_json),
    ("trim", |r, v, a| text::filter(r, "trim", &v, a)),
    ("truncate", |r, v, a| text::filter(r, "truncate", &v, a)),
    ("unique", |r, v, a| sequence::filter(r, "unique", v, a)),
    ("upper", |r, v, a| text::filter(r, "upper", &v, a)),
    ("urlencode", |r, v, a| web::filter(r, "urlencode", &v, a)),
    ("urlize", |r, v, a| web::filter(r, "urlize", &v, a)),
    ("wordcount", |r, v, a| text::filter(r, "wordcount", &v, a)),
    ("wordwrap", |r, v, a| text::filter(r, "wordwrap", &v, a)),
    ("xmlattr", |r, v, a| web::filter(r, "xmlattr", &v, a)),
];

fn length(run: &mut Run<'_>, value: Value, args: CallArgs) -> Res<Value> {
    let [] = args.bind("length", [])?;
    Ok(Value::int(value.len(&mut run.budget)?))
}

fn default(_: &mut Run<'_>, value: Value, args: CallArgs) -> Res<Value> {
    let [default, boolean] = args.bind("default", ["default_value", "boolean"])?;
    let replace = value.is_undefined() || boolean.is_some_and(|b| b.truth()) && !value.truth();
    Ok(match replace {
        true => default.unwrap_or_else(|| Value::from("")),
        false => value,
    })
}

fn items(run: &mut Run<'_>, value: Value, args: CallArgs) -> Res<Value> {
    let [] = args.bind("items", [])?;
    let pairs = match &value {
        Value::Undefined(_) => Vec::new(),
        Value::Dict(d) => methods::pairs(d, &mut run.budget)?,
        // Said where the first pair is asked for.
        _ => return Ok(Value::failing("Can only get item pairs from a mapping.")),
    };
    Value::iter("generator", pairs, &mut run.budget)
}

fn attr(run: &mut Run<'_>, value: Value, args: CallArgs) -> Res<Value> {
    let [name] = args.bind("attr", ["name"])?;
    let name = name.unwrap_or(Value::None).to_text(&mut run.budget)?;
    match &value {
        // An item is no attribute.
        Value::Dict(_) if !Method::named(&name).is_some_and(|m| m.of(&value)) => {
            Ok(value.no_attribute(&name))
        }
        _ => run.attribute_named(&value, &name),
    }
}

/// transformers' tojson: json.dumps, without HTML escaping.
fn to_json(run: &mut Run<'_>, value: Value, args: CallArgs) -> Res<Value> {
    let json = json_options(args, &mut run.budget)?;
    let mut out = Text::with_capacity(256);
    json.write(&value, 0, &mut out, &mut run.budget)?;
    Ok(Value::Str(out.finish(false)))
}

/// tojson's arguments.
pub(super) fn json_options(args: CallArgs, budget: &mut Budget) -> Res<Json> {
    let [ascii, indent, separators, sort] = args.bind(
        "tojson",
        ["ensure_ascii", "indent", "separators", "sort_keys"],
    )?;
    let indent = match indent {
        None | Some(Value::None) => None,
        Some(Value::Str(s)) => Some(s.text.to_string()),
        Some(other) => match other.as_int() {
            Some(n) => {
                let n = usize::try_from(n.max(0)).unwrap_or(usize::MAX);
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
        None | Some(Value::None) => {
            let item = if indent.is_some() { "," } else { ", " };
            (Cow::Borrowed(item), Cow::Borrowed(": "))
        }
        Some(pair) => match &pair.items(budget)?[..] {
            [Value::Str(item), Value::Str(key)] => (
                Cow::Owned(item.text.to_string()),
                Cow::Owned(key.text.to_string()),
            ),
            _ => return fault("separators must be a pair of strings"),
        },
    };
    Ok(Json {
        indent,
        item_separator,
        key_separator,
        sort_keys: sort.is_some_and(|s| s.truth()),
        ensure_ascii: ascii.is_some_and(|a| a.truth()),
    })
}
