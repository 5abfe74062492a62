//! Jinja2's tests: what can stand behind `is`.

use super::filters;
use super::methods;
use super::ops::compare;
use super::origin::Str;
use super::program::{Comparison, Op};
use super::run::{CallArgs, Run};
use super::text;
use super::value::{Key, Res, Value, fault};

/// What a test is: its name, the value before `is`, and the arguments.
pub(super) type Test = fn(&mut Run<'_>, &str, &Value, CallArgs) -> Res<bool>;

/// The test of this name. None is an error, but only where it is reached.
pub(super) fn named(name: &str) -> Option<Test> {
    Some(match name {
        "defined" => |_, name, value, args| {
            let [] = args.bind(name, [])?;
            Ok(!value.is_undefined())
        },
        "none" => |_, name, value, args| {
            let [] = args.bind(name, [])?;
            Ok(matches!(value, Value::None))
        },
        "string" => |_, name, value, args| {
            let [] = args.bind(name, [])?;
            Ok(matches!(value, Value::Str(_)))
        },
        _ if TESTS.binary_search(&name).is_ok() => test,
        _ => return None,
    })
}

pub(super) fn unknown<T>(name: &str) -> Res<T> {
    fault(format!("No test named '{name}'."))
}

/// Every test, in order of names.
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

/// Can it be walked over?
pub(super) fn is_iterable(value: &Value) -> bool {
    matches!(
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
    )
}

/// `value is name(args)`.
fn test(run: &mut Run<'_>, name: &str, value: &Value, args: CallArgs) -> Res<bool> {
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
        let mut other = other;
        run.settle(&mut other)?;
        return compare(op, value, &other, &mut run.budget);
    }
    if matches!(name, "divisibleby" | "sameas") {
        let [other] = args.bind(name, ["other"])?;
        let Some(other) = other else {
            return fault(format!("test '{name}' needs an argument"));
        };
        if name == "sameas" {
            // What is not there is made anew wherever it is asked for.
            let there = !value.is_undefined();
            let alike = there && value.type_name() == other.type_name();
            return Ok(alike && value.equals(&other, budget)?);
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
        "iterable" => is_iterable(value),
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
        "filter" | "test" => {
            Key::of(value, budget)?;
            match value {
                Value::Str(s) if name == "filter" => filters::named(&s.text).is_some(),
                Value::Str(s) => TESTS.binary_search(&&*s.text).is_ok(),
                _ => false,
            }
        }
        _ => return unknown(name),
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
