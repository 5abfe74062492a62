//! Filters over sequences.

use std::cmp::Ordering;
use std::collections::HashSet;
use std::sync::Arc;

use super::super::checks::{self, Test};
use super::super::origin::{Str, Text};
use super::super::program::Op;
use super::super::run::{CallArgs, MAX_RANGE, Run};
use super::super::value::{Budget, Key, Res, Value, fault, html_escape};
use super::{Filter, named, unknown};

pub(super) fn filter(run: &mut Run<'_>, name: &str, value: Value, args: CallArgs) -> Res<Value> {
    match name {
        "list" => {
            let items = run.items(&value)?;
            Value::list(items, &mut run.budget)
        }
        "first" => {
            let mut source = run.source(&value)?;
            let first = run.pull(&mut source)?;
            Ok(first.unwrap_or_else(|| Value::undefined("No first item, sequence was empty.")))
        }
        "last" | "random" => {
            if let Value::Iter(i) = &value {
                return fault(format!("'{}' object is not reversible", i.type_name));
            }
            if let (Value::Dict(_), "random") = (&value, name) {
                return fault("a dict has no items by number to choose among");
            }
            let mut items = run.items(&value)?;
            let last = match name {
                "random" if !items.is_empty() => Some(items.swap_remove(any_index(items.len()))),
                _ => items.pop(),
            };
            Ok(last.unwrap_or_else(|| {
                Value::undefined(format!("No {name} item, sequence was empty."))
            }))
        }
        "join" => join(run, &value, args),
        "map" => map(run, &value, args),
        "select" | "reject" | "selectattr" | "rejectattr" => select(run, name, &value, args),
        "reverse" => match &value {
            Value::Str(s) => {
                run.budget.bytes(s.text.len())?;
                let mut out = Text::with_capacity(s.text.len());
                for (i, c) in s.text.char_indices().rev() {
                    out.part(s, i..i + c.len_utf8());
                }
                Ok(Value::Str(out.finish(s.markup)))
            }
            other => {
                let mut items = run.items(other)?;
                items.reverse();
                // What cannot be walked from its end becomes a list.
                if matches!(other, Value::Iter(_)) {
                    return Value::list(items, &mut run.budget);
                }
                Value::iter("list_reverseiterator", items, &mut run.budget)
            }
        },
        "sum" => {
            let [attribute, start] = args.bind(name, ["attribute", "start"])?;
            let mut total = start.unwrap_or(Value::Int(0));
            for item in run.items(&value)? {
                let item = by_attribute(run, &item, attribute.as_ref(), None)?;
                total = run.binary(Op::Add, &total, &item)?;
            }
            Ok(total)
        }
        "batch" | "slice" => or_failing(batch(run, name, &value, args)),
        "dictsort" => dict_sort(run, &value, args),
        "groupby" => group_by(run, &value, args),
        "unique" => or_failing(ordered(run, name, &value, args)),
        _ => ordered(run, name, &value, args),
    }
}

/// A generator's fault is raised where its first item is wanted.
fn or_failing(made: Res<Value>) -> Res<Value> {
    made.or_else(|fault| Ok(Value::failing(fault.message)))
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
    let separator = separator.to_str(&mut run.budget)?;
    let mut texts = Vec::new();
    for item in run.items(value)? {
        let item = by_attribute(run, &item, attribute.as_ref(), None)?;
        let text = item.to_str(&mut run.budget)?;
        run.budget
            .bytes(separator.text.len() + text.text.len() + size_of::<Str>())?;
        texts.push(text);
    }
    let markup = run.autoescape && (separator.markup || texts.iter().any(|text| text.markup));
    let mut out = Text::default();
    let mut piece = |s: &Str| match markup && !s.markup {
        true => out.made(&html_escape(&s.text), &s.origin),
        false => out.str(s),
    };
    for (i, text) in texts.iter().enumerate() {
        if i > 0 {
            piece(&separator);
        }
        piece(text);
    }
    Ok(Value::Str(out.finish(markup)))
}

/// What a generator does with each item.
#[derive(Debug)]
pub(in super::super) enum Job {
    /// A filter: itself, its name, its arguments.
    Filter(Option<Filter>, Arc<str>, CallArgs),
    Attribute(Value, Option<Value>),
    Select {
        attribute: Option<Value>,
        test: Option<(Option<Test>, Arc<str>)>,
        args: CallArgs,
        wanted: bool,
    },
}

impl Job {
    /// Jinja2's function that makes such a generator.
    pub fn function(&self) -> &'static str {
        match self {
            Job::Filter(..) | Job::Attribute(..) => "sync_do_map",
            Job::Select { .. } => "select_or_reject",
        }
    }

    /// The values it holds.
    pub fn values(&self) -> Vec<&Value> {
        match self {
            Job::Filter(_, _, args) | Job::Select { args, .. } => args
                .positional
                .iter()
                .chain(args.named.iter().map(|(_, value)| value))
                .collect(),
            Job::Attribute(attribute, default) => {
                default.iter().chain(std::iter::once(attribute)).collect()
            }
        }
    }
}

/// The item that a generator makes of this one; None where it leaves it out.
pub(in super::super) fn work(run: &mut Run<'_>, job: &Job, item: Value) -> Res<Option<Value>> {
    match job {
        Job::Filter(filter, name, args) => {
            let Some(filter) = filter else {
                return unknown(name);
            };
            let args = args.again(&mut run.budget)?;
            run.nested_call(|run| filter.call(run, item, args))
                .map(Some)
        }
        Job::Attribute(attribute, default) => {
            by_attribute(run, &item, Some(attribute), default.as_ref()).map(Some)
        }
        Job::Select {
            attribute,
            test,
            args,
            wanted,
        } => {
            let tested = by_attribute(run, &item, attribute.as_ref(), None)?;
            let passes = match test {
                None => tested.truth(),
                Some((Some(test), name)) => {
                    let args = args.again(&mut run.budget)?;
                    test(run, name, &tested, args)?
                }
                Some((None, name)) => return checks::unknown(name),
            };
            Ok((passes == *wanted).then_some(item))
        }
    }
}

/// A generator over `value`, whose faults are raised where the first item is wanted.
fn lazily(run: &mut Run<'_>, value: &Value, job: Res<Job>) -> Res<Value> {
    // As in Jinja2, nothing falsy is walked over, None included.
    if !value.truth() {
        return Value::generator("sync_do_map", Vec::new(), &mut run.budget);
    }
    match job.and_then(|job| Ok((run.source(value)?, job))) {
        Ok((source, job)) => Value::making(source, value, job, &mut run.budget),
        Err(fault) => Ok(Value::failing(fault.message)),
    }
}

fn map(run: &mut Run<'_>, value: &Value, mut args: CallArgs) -> Res<Value> {
    if args.positional.is_empty() {
        let job = args
            .bind("map", ["attribute", "default"])
            .and_then(|[attribute, default]| match attribute {
                Some(attribute) => Ok(Job::Attribute(attribute, default)),
                None => fault("map requires a filter argument"),
            });
        return lazily(run, value, job);
    }
    let name = args.positional.remove(0).to_text(&mut run.budget)?;
    lazily(run, value, Ok(Job::Filter(named(&name), name, args)))
}

fn select(run: &mut Run<'_>, name: &str, value: &Value, mut args: CallArgs) -> Res<Value> {
    let attribute = match name.ends_with("attr") {
        true if args.positional.is_empty() => {
            let missing = fault("Missing parameter for attribute name");
            return lazily(run, value, missing);
        }
        true => Some(args.positional.remove(0)),
        false => None,
    };
    let test = match args.positional.is_empty() {
        true => None,
        false => {
            let name = args.positional.remove(0).to_text(&mut run.budget)?;
            Some((checks::named(&name), name))
        }
    };
    let job = Job::Select {
        attribute,
        test,
        args,
        wanted: name.starts_with("select"),
    };
    lazily(run, value, Ok(job))
}

fn batch(run: &mut Run<'_>, name: &str, value: &Value, args: CallArgs) -> Res<Value> {
    let pieces = if name == "batch" {
        "linecount"
    } else {
        "slices"
    };
    let [count, fill] = args.bind(name, [pieces, "fill_with"])?;
    let items = run.items(value)?;
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
            group.extend(fill.iter().filter(|_| i >= larger).cloned());
            groups.push(group);
        }
    }
    let lists = groups
        .into_iter()
        .map(|g| Value::list(g, &mut run.budget))
        .collect::<Res<Vec<_>>>()?;
    let function = match name {
        "batch" => "do_batch",
        _ => "sync_do_slice",
    };
    Value::generator(function, lists, &mut run.budget)
}

/// What sorting compares: the value, strings in lower case unless case matters.
fn sort_key(value: Value, case_sensitive: bool, budget: &mut Budget) -> Res<Value> {
    match &value {
        Value::Str(s) if !case_sensitive => {
            budget.bytes(s.text.len())?;
            Ok(Value::Str(s.made_into(s.text.to_lowercase())))
        }
        _ => Ok(value),
    }
}

/// A stable sort by a comparison that can fail and need not be consistent.
pub(in super::super) fn sort_by<T>(
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
    for item in run.items(value)? {
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
            let mut seen = HashSet::new();
            let mut kept = Vec::new();
            for (key, item) in keyed {
                if seen.insert(Key::of(&key, budget)?) {
                    kept.push(item);
                }
            }
            Value::generator("do_unique", kept, budget)
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
                || Value::undefined("No aggregated item, sequence was empty."),
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
    for item in run.items(value)? {
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
