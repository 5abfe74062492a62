//! Evaluates expressions: names, attributes, items, slices, calls. Operators: `ops`.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::globals;
use super::methods::{self, Method};
use super::ops::{compare, negate};
use super::origin::{Str, Text};
use super::program::{Args, Comparison, Expr, Name};
use super::run::{CallArgs, Run};
use super::value::{Budget, Closure, LoopState, Range, Res, Value, fault, html_escape};
use super::{checks, filters};

impl<'p> Run<'p> {
    pub fn eval(&mut self, expr: &'p Expr) -> Res<Value> {
        match expr {
            Expr::Const(value) => Ok(value.clone()),
            Expr::Slot(place, name) => Ok(match self.slot(place.out, place.slot) {
                Some(value) => value.clone(),
                None => Value::no_variable(&self.program.names[*name as usize]),
            }),
            Expr::Global(name) => Ok(match self.global(*name) {
                Some(value) => value,
                None => Value::no_variable(&self.program.names[*name as usize]),
            }),
            Expr::Attr(..) | Expr::Item(_) => match self.peek(expr) {
                Some(value) => Ok(value.clone()),
                None => self.deeper(|run| run.eval_deep(expr)),
            },
            other => self.deeper(|run| run.eval_deep(other)),
        }
    }

    /// Is it true?
    pub(super) fn truth(&mut self, expr: &'p Expr) -> Res<bool> {
        if let Some(value) = self.peek(expr) {
            return Ok(value.truth());
        }
        Ok(self.eval(expr)?.truth())
    }

    fn eval_deep(&mut self, expr: &'p Expr) -> Res<Value> {
        match expr {
            Expr::Const(_) | Expr::Slot(..) | Expr::Global(_) => self.eval(expr),
            Expr::Captured => Ok(self.captured.last().cloned().unwrap_or(Value::None)),
            Expr::List(items) => {
                let items = self.all(items)?;
                Value::list(items, &mut self.budget)
            }
            Expr::Tuple(items) => {
                let items = self.all(items)?;
                Value::tuple(items, &mut self.budget)
            }
            Expr::Dict(pairs) => self.dict(pairs),
            Expr::Attr(object, name) => {
                let object = self.eval(object)?;
                self.attribute(&object, name)
            }
            Expr::Item(parts) => {
                let object = self.eval(&parts.0)?;
                let key = self.eval(&parts.1)?;
                self.item(&object, &key)
            }
            Expr::Slice(parts) => self.slice(&parts.0, &parts.1),
            Expr::Call(function, args) => self.call_expr(function, args),
            Expr::Filter(filter, name, input, args) => {
                let input = self.eval(input)?;
                let args = self.args(args)?;
                match filter {
                    Some(filter) => filter.call(self, input, args),
                    None => filters::unknown(name),
                }
            }
            Expr::Test(test, name, input, args) => {
                let input = self.eval(input)?;
                let args = self.args(args)?;
                match test {
                    Some(test) => test(self, name, &input, args).map(Value::Bool),
                    None => checks::unknown(name),
                }
            }
            Expr::Neg(inner) => negate(&self.eval(inner)?),
            Expr::Not(inner) => Ok(Value::Bool(!self.truth(inner)?)),
            Expr::And(pair) => match self.eval(&pair.0)? {
                left if left.truth() => self.eval(&pair.1),
                left => Ok(left),
            },
            Expr::Or(pair) => match self.eval(&pair.0)? {
                left if left.truth() => Ok(left),
                _ => self.eval(&pair.1),
            },
            Expr::Sum(parts) => {
                let first = self.eval(&parts[0])?;
                self.sum_from(first, &parts[1..])
            }
            Expr::Concat(parts) => self.concat(parts),
            Expr::Bin(op, pair) => {
                let (left, right) = (self.eval(&pair.0)?, self.eval(&pair.1)?);
                self.binary(*op, &left, &right)
            }
            Expr::Compare(first, chain) => self.compare(first, chain),
            Expr::If(parts) => match (self.truth(&parts.0)?, &parts.2) {
                (true, _) => self.eval(&parts.1),
                (false, Some(otherwise)) => self.eval(otherwise),
                (false, None) => Ok(Value::undefined(
                    "the inline if-expression evaluated to false and no else section was defined.",
                )),
            },
        }
    }

    /// `first + rest[0] + ...`: text is gathered as long as it is plain.
    pub(super) fn sum_from(&mut self, first: Value, rest: &'p [Expr]) -> Res<Value> {
        let mut sum = first;
        let mut at = 0;
        while at < rest.len() {
            if let Value::Str(s) = &sum
                && !s.markup
            {
                let mut text = Text::with_capacity(s.text.len() + 64);
                text.str(s);
                let mut other = None;
                while at < rest.len() && other.is_none() {
                    match self.eval(&rest[at])? {
                        Value::Str(s) if !s.markup => {
                            self.budget.bytes(s.text.len())?;
                            text.str(&s);
                        }
                        value => other = Some(value),
                    }
                    at += 1;
                }
                self.budget.bytes(text.text.len())?;
                sum = Value::Str(text.finish(false));
                if let Some(other) = other {
                    sum = self.add(&sum, &other)?;
                }
                continue;
            }
            let right = self.eval(&rest[at])?;
            sum = self.add(&sum, &right)?;
            at += 1;
        }
        Ok(sum)
    }

    fn concat(&mut self, parts: &'p [Expr]) -> Res<Value> {
        let mut texts = Vec::with_capacity(parts.len());
        let mut markup = false;
        for part in parts {
            let s = self.eval(part)?.to_str(&mut self.budget)?;
            self.budget.bytes(s.text.len())?;
            markup |= s.markup;
            texts.push(s);
        }
        let markup = markup && self.autoescape;
        let mut out = Text::default();
        for s in &texts {
            match markup && !s.markup {
                true => out.made(&html_escape(&s.text), &s.origin),
                false => out.str(s),
            }
        }
        Ok(Value::Str(out.finish(markup)))
    }

    fn all(&mut self, exprs: &'p [Expr]) -> Res<Vec<Value>> {
        let mut all = Vec::with_capacity(exprs.len());
        for expr in exprs {
            all.push(self.eval(expr)?);
        }
        Ok(all)
    }

    fn dict(&mut self, pairs: &'p [(Expr, Expr)]) -> Res<Value> {
        let mut out = Vec::with_capacity(pairs.len());
        for (key, value) in pairs {
            out.push((self.eval(key)?, self.eval(value)?));
        }
        Value::dict(out, &mut self.budget)
    }

    fn compare(&mut self, first: &'p Expr, chain: &'p [(Comparison, Expr)]) -> Res<Value> {
        if let [(op @ (Comparison::Eq | Comparison::Ne), right)] = chain
            && let (Some(Value::Str(a)), Some(Value::Str(b))) = (self.peek(first), self.peek(right))
        {
            let (equal, size) = (a.text == b.text, a.text.len().min(b.text.len()));
            self.budget.steps(1 + size / 64)?;
            return Ok(Value::Bool(equal == (*op == Comparison::Eq)));
        }
        let mut left = self.eval(first)?;
        for (op, right) in chain {
            let mut right = self.eval(right)?;
            if matches!(op, Comparison::In | Comparison::NotIn) {
                self.settle(&mut right)?;
            }
            if !compare(*op, &left, &right, &mut self.budget)? {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    pub(super) fn args(&mut self, args: &'p Args) -> Res<CallArgs> {
        let mut out = CallArgs {
            positional: self.all(&args.positional)?,
            named: Vec::with_capacity(args.named.len()),
        };
        for (name, expr) in &args.named {
            out.named.push((name.clone(), self.eval(expr)?));
        }
        if let Some(star) = &args.star {
            let more = self.eval(star)?;
            out.positional.extend(self.items(&more)?);
        }
        if let Some(star_star) = &args.star_star {
            let Value::Dict(more) = self.eval(star_star)? else {
                return fault("argument after ** must be a mapping");
            };
            self.budget.bytes(more.entries.len() * size_of::<Value>())?;
            for (key, value) in &more.entries {
                let Value::Str(key) = key else {
                    return fault("keywords must be strings");
                };
                if out.named.iter().any(|(name, _)| *name == key.text) {
                    return fault(format!(
                        "got multiple values for keyword argument '{}'",
                        key.text
                    ));
                }
                out.named.push((key.text.clone(), value.clone()));
            }
        }
        Ok(out)
    }

    fn call_expr(&mut self, function: &'p Expr, args: &'p Args) -> Res<Value> {
        if let Expr::Attr(object, name) = function {
            let object = self.eval(object)?;
            if let Some(method) = name.method.filter(|method| method.of(&object)) {
                let args = self.args(args)?;
                return methods::call(self, &object, method, args);
            }
            let function = self.attribute(&object, name)?;
            let args = self.args(args)?;
            return self.call(&function, args);
        }
        let function = self.eval(function)?;
        let args = self.args(args)?;
        self.call(&function, args)
    }

    pub fn call(&mut self, function: &Value, args: CallArgs) -> Res<Value> {
        match function {
            Value::Undefined(missing) => missing.fault(),
            Value::Function(builtin) => globals::call(self, *builtin, args),
            Value::Method(method) => methods::call(self, &method.0, method.1, args),
            Value::Macro(closure) => self.nested_call(|run| run.call_macro(closure, args)),
            Value::Loop(state) => self.nested_call(|run| run.recurse(state, args)),
            Value::Joiner(joiner) => Ok(match joiner.used.fetch_add(1, Ordering::Relaxed) {
                0 => Value::from(""),
                _ => joiner.items.items.first().cloned().unwrap_or(Value::None),
            }),
            other => fault(format!("'{}' object is not callable", other.type_name())),
        }
    }

    /// `object.name`: a method or attribute, else the item of that name, else undefined.
    pub fn attribute(&mut self, object: &Value, name: &Name) -> Res<Value> {
        self.attribute_of(object, &name.text, name.method)
    }

    /// The same, for a name that was not known before.
    pub fn attribute_named(&mut self, object: &Value, name: &Arc<str>) -> Res<Value> {
        self.attribute_of(object, name, Method::named(name))
    }

    fn attribute_of(
        &mut self,
        object: &Value,
        name: &Arc<str>,
        method: Option<Method>,
    ) -> Res<Value> {
        if let Value::Undefined(missing) = object {
            return missing.fault();
        }
        if let Some(method) = method.filter(|method| method.of(object)) {
            return Ok(Value::Method(Arc::new((object.clone(), method))));
        }
        if methods::is_unsafe(object, name) {
            let message = format!(
                "access to attribute '{name}' of '{}' object is unsafe.",
                object.type_name()
            );
            return Ok(Value::undefined(message));
        }
        let found = match object {
            Value::Dict(dict) => dict.get_str(name).cloned(),
            Value::Namespace(id) => {
                let vars = &self.budget.namespaces[*id];
                vars.iter().find(|(n, _)| n == name).map(|(_, v)| v.clone())
            }
            Value::Loop(state) => self.loop_attribute(state, name)?,
            Value::Int(_) | Value::Bool(_) | Value::Big(_) | Value::Float(_) => {
                number_part(object, name)
            }
            Value::Macro(closure) => self.macro_attribute(closure, name)?,
            // groupby's pairs have names.
            Value::Tuple(pair) if pair.items.len() == 2 && &**name == "grouper" => {
                Some(pair.items[0].clone())
            }
            Value::Tuple(pair) if pair.items.len() == 2 && &**name == "list" => {
                Some(pair.items[1].clone())
            }
            Value::Cycler(c) if &**name == "current" => {
                let at = c.used.load(Ordering::Relaxed) % c.items.items.len().max(1);
                c.items.items.get(at).cloned()
            }
            _ => None,
        };
        Ok(found.unwrap_or_else(|| object.no_attribute(name)))
    }

    fn macro_attribute(&mut self, closure: &Closure, name: &str) -> Res<Option<Value>> {
        let function = &self.program.functions[closure.id];
        Ok(Some(match name {
            "name" => Value::from(&*function.name),
            "catch_kwargs" => Value::Bool(function.kwargs.is_some()),
            "catch_varargs" => Value::Bool(function.varargs.is_some()),
            "caller" => Value::Bool(function.caller.is_some()),
            "arguments" => {
                let names = function.params.iter().map(|p| Value::from(&*p.name));
                Value::tuple(names.collect(), &mut self.budget)?
            }
            _ => return Ok(None),
        }))
    }

    fn loop_attribute(&mut self, state: &Arc<LoopState>, name: &str) -> Res<Option<Value>> {
        let i = state.index();
        let missing = |what: &str| Value::undefined(format!("there is no {what} item"));
        Ok(Some(match name {
            "index" => Value::int(i + 1),
            "index0" => Value::int(i),
            "first" => Value::Bool(i == 0),
            "last" => {
                let known = state.turn().len;
                Value::Bool(match known {
                    Some(len) => i + 1 == len,
                    None => self.peek_turn(state)?.is_none(),
                })
            }
            "length" => Value::int(self.count_turns(state)?),
            "revindex" => Value::int(self.count_turns(state)?.saturating_sub(i)),
            "revindex0" => Value::int(self.count_turns(state)?.saturating_sub(i + 1)),
            "depth" => Value::int(state.depth + 1),
            "depth0" => Value::int(state.depth),
            "previtem" => {
                let before = state.turn().before.clone();
                before.unwrap_or_else(|| missing("previous"))
            }
            "nextitem" => self.peek_turn(state)?.unwrap_or_else(|| missing("next")),
            _ => return Ok(None),
        }))
    }

    /// `object[key]`: the item, else the attribute of that name, else undefined.
    pub fn item(&mut self, object: &Value, key: &Value) -> Res<Value> {
        let found = match (object, key) {
            (Value::Undefined(missing), _) => return missing.fault(),
            (Value::Dict(dict), _) => dict.get(key, &mut self.budget).unwrap_or(None).cloned(),
            (Value::List(s) | Value::Tuple(s), _) => {
                index(key, s.items.len()).and_then(|i| s.items.get(i).cloned())
            }
            (Value::Range(r), _) => index(key, r.len()).map(|i| r.at(i)),
            (Value::Str(s), _) if key.as_int().is_some() => {
                self.budget.steps(s.text.len() / 64)?;
                let i = index(key, object.len(&mut self.budget)?);
                i.and_then(|i| s.text.char_indices().nth(i))
                    .map(|(at, c)| Value::Str(s.part(at..at + c.len_utf8())))
            }
            _ => None,
        };
        match (found, key) {
            (Some(value), _) => Ok(value),
            (None, Value::Str(name)) => self.attribute_named(object, &name.text),
            (None, key) => {
                let key = key.repr(&mut self.budget)?;
                Ok(missing(object, &format!("element {key}")))
            }
        }
    }

    fn slice(&mut self, object: &'p Expr, parts: &'p [Option<Expr>; 3]) -> Res<Value> {
        let object = self.eval(object)?;
        let mut bounds = [None; 3];
        for (bound, part) in bounds.iter_mut().zip(parts) {
            let Some(part) = part else { continue };
            *bound = match self.eval(part)? {
                Value::None => None,
                value => match value.as_int() {
                    Some(i) => Some(i),
                    None => {
                        return fault(
                            "slice indices must be integers or None or have an __index__ method",
                        );
                    }
                },
            };
        }
        let len = object.len(&mut self.budget)?;
        let indices = |budget: &mut Budget| -> Res<Vec<usize>> {
            let indices = slice_indices(bounds, len)?;
            budget.bytes(indices.len() * size_of::<usize>())?;
            Ok(indices)
        };
        match &object {
            Value::Str(s) => {
                if bounds[2].is_none_or(|step| step == 1) {
                    return Ok(Value::Str(char_range(s, bounds, len)));
                }
                self.budget.bytes(8 * len)?;
                let places: Vec<(usize, char)> = s.text.char_indices().collect();
                let mut text = Text::default();
                for i in indices(&mut self.budget)? {
                    let (at, c) = places[i];
                    text.part(s, at..at + c.len_utf8());
                }
                Ok(Value::Str(text.finish(s.markup)))
            }
            Value::List(s) => {
                let items = indices(&mut self.budget)?
                    .into_iter()
                    .map(|i| s.items[i].clone())
                    .collect();
                Value::list(items, &mut self.budget)
            }
            Value::Tuple(s) => {
                let items = indices(&mut self.budget)?
                    .into_iter()
                    .map(|i| s.items[i].clone())
                    .collect();
                Value::tuple(items, &mut self.budget)
            }
            Value::Range(r) => range_slice(r, bounds, len),
            Value::Undefined(missing) => missing.fault(),
            other => fault(format!(
                "'{}' object is not subscriptable",
                other.type_name()
            )),
        }
    }
}

/// A Python index into `len` items.
pub(super) fn index(key: &Value, len: usize) -> Option<usize> {
    let i = key.as_int()?;
    let i = if i < 0 { i + len as i128 } else { i };
    usize::try_from(i).ok().filter(|i| *i < len)
}

/// The indices that `[start:stop:step]` takes of `len` items.
fn slice_indices(bounds: [Option<i128>; 3], len: usize) -> Res<Vec<usize>> {
    let (mut at, end, step) = slice_bounds(bounds, len)?;
    let mut out = Vec::new();
    while (step > 0 && at < end) || (step < 0 && at > end) {
        out.push(at as usize);
        at = at.saturating_add(step);
    }
    Ok(out)
}

/// Where a slice of `len` items begins, ends, and its step.
fn slice_bounds([start, stop, step]: [Option<i128>; 3], len: usize) -> Res<(i128, i128, i128)> {
    let step = step.unwrap_or(1);
    if step == 0 {
        return fault("slice step cannot be zero");
    }
    let len = len as i128;
    let (low, high) = if step > 0 { (0, len) } else { (-1, len - 1) };
    let place = |bound: Option<i128>, default: i128| match bound {
        None => default,
        Some(i) if i < 0 => i.saturating_add(len).clamp(low, high),
        Some(i) => i.clamp(low, high),
    };
    Ok(match step > 0 {
        true => (place(start, low), place(stop, high), step),
        false => (place(start, high), place(stop, low), step),
    })
}

/// What a failed lookup gives, with the message its use raises.
fn missing(object: &Value, what: &str) -> Value {
    let owner = match object {
        Value::None => "'None'".to_owned(),
        other => format!("'{} object'", other.type_name()),
    };
    Value::undefined(format!("{owner} has no {what}"))
}

/// `range[start:stop:step]` is a range again.
fn range_slice(range: &Range, bounds: [Option<i128>; 3], len: usize) -> Res<Value> {
    let (from, to, step) = slice_bounds(bounds, len)?;
    let at = |i: i128| i.saturating_mul(range.step).saturating_add(range.start);
    Ok(Value::Range(Arc::new(Range {
        start: at(from),
        stop: at(to),
        step: step.saturating_mul(range.step),
    })))
}

/// `text[start:stop]`.
fn char_range(s: &Str, [start, stop, _]: [Option<i128>; 3], len: usize) -> Str {
    let place = |bound: Option<i128>, default: usize| match bound {
        None => default,
        Some(i) if i < 0 => usize::try_from(i.saturating_add(len as i128)).unwrap_or(0),
        Some(i) => usize::try_from(i).unwrap_or(len).min(len),
    };
    let (from, to) = (place(start, 0), place(stop, len));
    if from >= to {
        return s.part(0..0);
    }
    if s.text.len() == len {
        return s.part(from..to);
    }
    let byte = |i: usize| {
        s.text
            .char_indices()
            .nth(i)
            .map_or(s.text.len(), |(at, _)| at)
    };
    s.part(byte(from)..byte(to))
}

/// What Python's numbers have besides methods.
fn number_part(object: &Value, name: &str) -> Option<Value> {
    Some(match (object, name) {
        (Value::Bool(b), "real" | "numerator") => Value::Int(i128::from(*b)),
        (_, "real") => object.clone(),
        (Value::Float(_), "imag") => Value::Float(0.0),
        (Value::Float(_), _) => return None,
        (_, "imag") => Value::Int(0),
        (_, "numerator") => object.clone(),
        (_, "denominator") => Value::Int(1),
        _ => return None,
    })
}
