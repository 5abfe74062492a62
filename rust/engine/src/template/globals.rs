//! The functions that templates can name, with transformers' own in their place.

use std::sync::Arc;

use super::clock::Now;
use super::origin::Str;
use super::run::{CallArgs, MAX_RANGE, Run, thrown};
use super::value::{Range, Res, Value, fault};

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
            Ok(Value::Str(format.made_into(now.strftime(&format.text))))
        }
        Builtin::Range => range(args),
        Builtin::Dict => {
            let pairs = dict_pairs(run, args)?;
            Value::dict(pairs, &mut run.budget)
        }
        Builtin::Namespace => {
            let pairs = dict_pairs(run, args)?;
            run.budget.bytes(64)?;
            run.budget.namespaces.push(Vec::new());
            let id = run.budget.namespaces.len() - 1;
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
    if !args.named.is_empty() {
        return fault("range() takes no keyword arguments");
    }
    let [a, b, c] = args.bind("range", ["start", "stop", "step"])?;
    let int = |value: Option<Value>, default: i128| match value {
        None => Ok(default),
        Some(v) => match v.as_int() {
            Some(i) => Ok(i),
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
fn dict_pairs(run: &mut Run<'_>, mut args: CallArgs) -> Res<Vec<(Value, Value)>> {
    let mut pairs = Vec::new();
    match (args.positional.pop(), args.positional.len()) {
        (None, _) => {}
        (Some(Value::Dict(d)), 0) => pairs.extend(d.entries.iter().cloned()),
        (Some(Value::Undefined(missing)), 0) => return missing.fault(),
        (Some(other), 0) => {
            for pair in run.items(&other)? {
                let [key, value] = <[Value; 2]>::try_from(run.items(&pair)?).or_else(|items| {
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
    run.budget.bytes((pairs.len() + args.named.len()) * 64)?;
    let named = args.named.into_iter();
    pairs.extend(named.map(|(name, value)| (Value::Str(Str::from(name)), value)));
    Ok(pairs)
}
