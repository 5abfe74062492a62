//! Jinja2's filters, with transformers' own in their place: which there are, and the general ones.

mod number;
mod pretty;
pub(super) mod sequence;
mod text;
mod web;

use std::borrow::Cow;
use std::sync::Arc;

use super::format::Json;
use super::methods::{self, Method};
use super::origin::{Str, Text};
use super::run::{CallArgs, Run};
use super::value::{Budget, Res, Value, fault};

pub(super) use sequence::sort_by;

/// A filter: its parameters as Jinja2 declares them (None: any), how many of them must be given, and what it does to
/// the value before the bar.
#[derive(Debug)]
pub(super) struct Definition {
    name: &'static str,
    parameters: Option<(&'static [&'static str], usize)>,
    apply: fn(&mut Run<'_>, Value, CallArgs) -> Res<Value>,
}

pub(super) type Filter = &'static Definition;

impl Definition {
    /// Run it; a TypeError for arguments that it does not take.
    pub fn call(&self, run: &mut Run<'_>, value: Value, args: CallArgs) -> Res<Value> {
        if let Some((names, required)) = self.parameters {
            self.check(&args, names, required)?;
        }
        (self.apply)(run, value, args)
    }

    fn check(&self, args: &CallArgs, names: &[&str], required: usize) -> Res<()> {
        let (name, given) = (self.name, args.positional.len());
        if given > names.len() {
            let most = names.len() + 1;
            return fault(format!(
                "{name}() takes at most {most} arguments ({} given)",
                given + 1
            ));
        }
        let unknown = |(key, _): &&(Arc<str>, Value)| !names.contains(&&**key);
        if let Some((key, _)) = args.named.iter().find(unknown) {
            return fault(format!(
                "{name}() got an unexpected keyword argument '{key}'"
            ));
        }
        let missing = |key: &&&str| !args.named.iter().any(|(known, _)| **known == ***key);
        match names.iter().take(required).skip(given).find(missing) {
            Some(key) => fault(format!("{name}() missing a required argument: '{key}'")),
            None => Ok(()),
        }
    }
}

/// The filter of this name. None is an error, but only where it is reached.
pub(super) fn named(name: &str) -> Option<Filter> {
    let at = FILTERS.binary_search_by(|filter| filter.name.cmp(name));
    FILTERS.get(at.ok()?)
}

pub(super) fn unknown<T>(name: &str) -> Res<T> {
    fault(format!("No filter named '{name}'."))
}

/// The filters, in order of names.
static FILTERS: &[Definition] = &[
    Definition {
        name: "abs",
        parameters: Some((&[], 0)),
        apply: |r, v, a| number::filter(r, "abs", &v, a),
    },
    Definition {
        name: "attr",
        parameters: Some((&["name"], 1)),
        apply: attr,
    },
    Definition {
        name: "batch",
        parameters: Some((&["linecount", "fill_with"], 1)),
        apply: |r, v, a| sequence::filter(r, "batch", v, a),
    },
    Definition {
        name: "capitalize",
        parameters: Some((&[], 0)),
        apply: |r, v, a| text::filter(r, "capitalize", &v, a),
    },
    Definition {
        name: "center",
        parameters: Some((&["width"], 0)),
        apply: |r, v, a| text::filter(r, "center", &v, a),
    },
    Definition {
        name: "count",
        parameters: Some((&[], 0)),
        apply: length,
    },
    Definition {
        name: "d",
        parameters: Some((&["default_value", "boolean"], 0)),
        apply: default,
    },
    Definition {
        name: "default",
        parameters: Some((&["default_value", "boolean"], 0)),
        apply: default,
    },
    Definition {
        name: "dictsort",
        parameters: Some((&["case_sensitive", "by", "reverse"], 0)),
        apply: |r, v, a| sequence::filter(r, "dictsort", v, a),
    },
    Definition {
        name: "e",
        parameters: Some((&[], 0)),
        apply: |r, v, a| web::filter(r, "e", &v, a),
    },
    Definition {
        name: "escape",
        parameters: Some((&[], 0)),
        apply: |r, v, a| web::filter(r, "escape", &v, a),
    },
    Definition {
        name: "filesizeformat",
        parameters: Some((&["binary"], 0)),
        apply: |r, v, a| number::filter(r, "filesizeformat", &v, a),
    },
    Definition {
        name: "first",
        parameters: Some((&[], 0)),
        apply: |r, v, a| sequence::filter(r, "first", v, a),
    },
    Definition {
        name: "float",
        parameters: Some((&["default"], 0)),
        apply: |r, v, a| number::filter(r, "float", &v, a),
    },
    Definition {
        name: "forceescape",
        parameters: Some((&[], 0)),
        apply: |r, v, a| web::filter(r, "forceescape", &v, a),
    },
    Definition {
        name: "format",
        parameters: None,
        apply: |r, v, a| text::filter(r, "format", &v, a),
    },
    Definition {
        name: "groupby",
        parameters: Some((&["attribute", "default", "case_sensitive"], 1)),
        apply: |r, v, a| sequence::filter(r, "groupby", v, a),
    },
    Definition {
        name: "indent",
        parameters: Some((&["width", "first", "blank"], 0)),
        apply: |r, v, a| text::filter(r, "indent", &v, a),
    },
    Definition {
        name: "int",
        parameters: Some((&["default", "base"], 0)),
        apply: |r, v, a| number::filter(r, "int", &v, a),
    },
    Definition {
        name: "items",
        parameters: Some((&[], 0)),
        apply: items,
    },
    Definition {
        name: "join",
        parameters: Some((&["d", "attribute"], 0)),
        apply: |r, v, a| sequence::filter(r, "join", v, a),
    },
    Definition {
        name: "last",
        parameters: Some((&[], 0)),
        apply: |r, v, a| sequence::filter(r, "last", v, a),
    },
    Definition {
        name: "length",
        parameters: Some((&[], 0)),
        apply: length,
    },
    Definition {
        name: "list",
        parameters: Some((&[], 0)),
        apply: |r, v, a| sequence::filter(r, "list", v, a),
    },
    Definition {
        name: "lower",
        parameters: Some((&[], 0)),
        apply: |r, v, a| text::filter(r, "lower", &v, a),
    },
    Definition {
        name: "map",
        parameters: None,
        apply: |r, v, a| sequence::filter(r, "map", v, a),
    },
    Definition {
        name: "max",
        parameters: Some((&["case_sensitive", "attribute"], 0)),
        apply: |r, v, a| sequence::filter(r, "max", v, a),
    },
    Definition {
        name: "min",
        parameters: Some((&["case_sensitive", "attribute"], 0)),
        apply: |r, v, a| sequence::filter(r, "min", v, a),
    },
    Definition {
        name: "pprint",
        parameters: Some((&[], 0)),
        apply: pretty::pprint,
    },
    Definition {
        name: "random",
        parameters: Some((&[], 0)),
        apply: |r, v, a| sequence::filter(r, "random", v, a),
    },
    Definition {
        name: "reject",
        parameters: None,
        apply: |r, v, a| sequence::filter(r, "reject", v, a),
    },
    Definition {
        name: "rejectattr",
        parameters: None,
        apply: |r, v, a| sequence::filter(r, "rejectattr", v, a),
    },
    Definition {
        name: "replace",
        parameters: Some((&["old", "new", "count"], 2)),
        apply: |r, v, a| text::filter(r, "replace", &v, a),
    },
    Definition {
        name: "reverse",
        parameters: Some((&[], 0)),
        apply: |r, v, a| sequence::filter(r, "reverse", v, a),
    },
    Definition {
        name: "round",
        parameters: Some((&["precision", "method"], 0)),
        apply: |r, v, a| number::filter(r, "round", &v, a),
    },
    Definition {
        name: "safe",
        parameters: Some((&[], 0)),
        apply: |r, v, a| web::filter(r, "safe", &v, a),
    },
    Definition {
        name: "select",
        parameters: None,
        apply: |r, v, a| sequence::filter(r, "select", v, a),
    },
    Definition {
        name: "selectattr",
        parameters: None,
        apply: |r, v, a| sequence::filter(r, "selectattr", v, a),
    },
    Definition {
        name: "slice",
        parameters: Some((&["slices", "fill_with"], 1)),
        apply: |r, v, a| sequence::filter(r, "slice", v, a),
    },
    Definition {
        name: "sort",
        parameters: Some((&["reverse", "case_sensitive", "attribute"], 0)),
        apply: |r, v, a| sequence::filter(r, "sort", v, a),
    },
    Definition {
        name: "string",
        parameters: Some((&[], 0)),
        apply: |r, v, a| web::filter(r, "string", &v, a),
    },
    Definition {
        name: "striptags",
        parameters: Some((&[], 0)),
        apply: |r, v, a| web::filter(r, "striptags", &v, a),
    },
    Definition {
        name: "sum",
        parameters: Some((&["attribute", "start"], 0)),
        apply: |r, v, a| sequence::filter(r, "sum", v, a),
    },
    Definition {
        name: "title",
        parameters: Some((&[], 0)),
        apply: |r, v, a| text::filter(r, "title", &v, a),
    },
    Definition {
        name: "tojson",
        parameters: Some((&["ensure_ascii", "indent", "separators", "sort_keys"], 0)),
        apply: to_json,
    },
    Definition {
        name: "trim",
        parameters: Some((&["chars"], 0)),
        apply: |r, v, a| text::filter(r, "trim", &v, a),
    },
    Definition {
        name: "truncate",
        parameters: Some((&["length", "killwords", "end", "leeway"], 0)),
        apply: |r, v, a| text::filter(r, "truncate", &v, a),
    },
    Definition {
        name: "unique",
        parameters: Some((&["case_sensitive", "attribute"], 0)),
        apply: |r, v, a| sequence::filter(r, "unique", v, a),
    },
    Definition {
        name: "upper",
        parameters: Some((&[], 0)),
        apply: |r, v, a| text::filter(r, "upper", &v, a),
    },
    Definition {
        name: "urlencode",
        parameters: Some((&[], 0)),
        apply: |r, v, a| web::filter(r, "urlencode", &v, a),
    },
    Definition {
        name: "urlize",
        parameters: Some((
            &[
                "trim_url_limit",
                "nofollow",
                "target",
                "rel",
                "extra_schemes",
            ],
            0,
        )),
        apply: |r, v, a| web::filter(r, "urlize", &v, a),
    },
    Definition {
        name: "wordcount",
        parameters: Some((&[], 0)),
        apply: |r, v, a| text::filter(r, "wordcount", &v, a),
    },
    Definition {
        name: "wordwrap",
        parameters: Some((
            &[
                "width",
                "break_long_words",
                "wrapstring",
                "break_on_hyphens",
            ],
            0,
        )),
        apply: |r, v, a| text::filter(r, "wordwrap", &v, a),
    },
    Definition {
        name: "xmlattr",
        parameters: Some((&["autospace"], 0)),
        apply: |r, v, a| web::filter(r, "xmlattr", &v, a),
    },
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
    Value::generator("do_items", pairs, &mut run.budget)
}

fn attr(run: &mut Run<'_>, value: Value, args: CallArgs) -> Res<Value> {
    let [name] = args.bind("attr", ["name"])?;
    let name = match name {
        Some(Value::Str(Str { text, .. })) => text,
        other => {
            let kind = other.as_ref().map_or("NoneType", Value::type_name);
            return fault(format!("attribute name must be string, not '{kind}'"));
        }
    };
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
