//! Runs a compiled template with Jinja2's scopes and Python's operators, within a budget.

use std::ops::Range as Span;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use super::clock::Now;
use super::filters::{self, Builtin};
use super::format;
use super::methods;
use super::syntax::{Args, Comparison, Expr, For, Macro, Op, Program, Stmt, StmtKind, Target};
use super::value::{Budget, Closure, Fault, LoopState, Res, Str, Value, fault, html_escape};

/// Deepest nesting of evaluation, over macros and recursive loops too; keeps within a thread's stack.
const MAX_NESTING: usize = 700;
/// Deepest nesting of macro calls and recursive loops.
const MAX_CALLS: usize = 100;
/// Largest range, as Jinja2's sandbox has it, and longest string or list from `*`.
pub(super) const MAX_RANGE: usize = 100_000;

/// Evaluated call arguments.
#[derive(Default)]
pub(super) struct CallArgs {
    pub positional: Vec<Value>,
    pub named: Vec<(Arc<str>, Value)>,
}

impl CallArgs {
    /// Sort the arguments to these parameters; a TypeError for what does not fit.
    pub fn bind<const N: usize>(self, what: &str, names: [&str; N]) -> Res<[Option<Value>; N]> {
        if self.positional.len() > N {
            return fault(format!(
                "{what}() takes at most {N} arguments ({} given)",
                self.positional.len()
            ));
        }
        let mut bound = [const { None }; N];
        for (slot, value) in bound.iter_mut().zip(self.positional) {
            *slot = Some(value);
        }
        for (name, value) in self.named {
            match names.iter().position(|n| **n == *name) {
                Some(i) if bound[i].is_none() => bound[i] = Some(value),
                Some(_) => {
                    return fault(format!(
                        "{what}() got multiple values for argument '{name}'"
                    ));
                }
                None => {
                    return fault(format!(
                        "{what}() got an unexpected keyword argument '{name}'"
                    ));
                }
            }
        }
        Ok(bound)
    }
}

struct Scope {
    vars: Vec<(u32, Value)>,
    parent: Option<usize>,
    /// A macro was defined in it and may outlive the block.
    captured: bool,
}

enum Flow {
    Next,
    Break,
    Continue,
}

/// One render.
pub(super) struct Run<'p> {
    program: &'p Program,
    pub budget: Budget,
    pub now: Option<Now>,
    /// The caller's variables, by name id.
    context: Vec<Option<Value>>,
    scopes: Vec<Scope>,
    scope: usize,
    pub namespaces: Vec<Vec<(Arc<str>, Value)>>,
    captured: Vec<Value>,
    /// The output, and above it the texts being captured.
    buffers: Vec<String>,
    spans: Vec<Span<usize>>,
    /// Bytes and code points of the output already counted.
    counted: (usize, usize),
    pub autoescape: bool,
    nesting: usize,
    calls: usize,
}

impl<'p> Run<'p> {
    pub fn new(program: &'p Program, budget: Budget, now: Option<Now>) -> Run<'p> {
        Run {
            program,
            budget,
            now,
            context: vec![None; program.names.len()],
            scopes: vec![Scope {
                vars: Vec::new(),
                parent: None,
                captured: true,
            }],
            scope: 0,
            namespaces: Vec::new(),
            captured: Vec::new(),
            buffers: vec![String::new()],
            spans: Vec::new(),
            counted: (0, 0),
            autoescape: false,
            nesting: 0,
            calls: 0,
        }
    }

    /// Give a variable, if the template mentions it.
    pub fn define(&mut self, name: &str, value: impl FnOnce(&mut Budget) -> Res<Value>) -> Res<()> {
        if let Some(id) = self.program.id(name) {
            self.context[id as usize] = Some(value(&mut self.budget)?);
        }
        Ok(())
    }

    /// The text, and the spans of its generation blocks in code points.
    pub fn finish(mut self) -> Res<(String, Vec<Span<usize>>)> {
        let program = self.program;
        self.exec(&program.body)?;
        Ok((self.buffers.swap_remove(0), self.spans))
    }

    /// One level down: everything that recurses goes through here.
    fn deeper<T>(&mut self, inner: impl FnOnce(&mut Self) -> Res<T>) -> Res<T> {
        self.budget.steps(1)?;
        self.nesting += 1;
        if self.nesting > MAX_NESTING {
            return fault("maximum recursion depth exceeded");
        }
        let result = inner(self);
        self.nesting -= 1;
        result
    }

    fn exec(&mut self, stmts: &'p [Stmt]) -> Res<Flow> {
        for stmt in stmts {
            let flow = match &stmt.kind {
                StmtKind::Text(text) => self.write(text).map(|()| Flow::Next),
                _ => self.deeper(|run| run.stmt(stmt)),
            };
            match flow {
                Ok(Flow::Next) => {}
                Ok(other) => return Ok(other),
                Err(mut error) => {
                    error.line.get_or_insert(stmt.line);
                    return Err(error);
                }
            }
        }
        Ok(Flow::Next)
    }

    fn stmt(&mut self, stmt: &'p Stmt) -> Res<Flow> {
        match &stmt.kind {
            StmtKind::Text(text) => self.write(text)?,
            StmtKind::Emit(expr) => {
                let value = self.eval(expr)?;
                self.emit(&value)?;
            }
            StmtKind::For(id) => self.for_stmt(*id)?,
            StmtKind::If(branches, otherwise) => return self.if_stmt(branches, otherwise),
            StmtKind::With(pairs, body) => return self.with_stmt(pairs, body),
            StmtKind::Set(target, expr) => {
                let value = self.eval(expr)?;
                self.assign(target, value)?;
            }
            StmtKind::SetBlock(target, filter, body) => {
                let value = self.capture(body)?;
                let value = self.filtered(value, filter.as_ref())?;
                self.assign(target, value)?;
            }
            StmtKind::AutoEscape(enabled, body) => return self.autoescape_stmt(enabled, body),
            StmtKind::FilterBlock(filter, body) => {
                let value = self.capture(body)?;
                let value = self.filtered(value, Some(filter))?;
                self.emit(&value)?;
            }
            StmtKind::Generation(body) => self.generation(body)?,
            StmtKind::Block(body) => return self.in_scope(0, |run| run.exec(body)),
            StmtKind::Macro(id) => {
                let closure = self.closure(*id);
                let name = self.program.macros[*id].name.clone();
                if let Some(name) = self.program.id(&name) {
                    self.bind(name, closure)?;
                }
            }
            StmtKind::CallBlock(call, id) => self.call_block(call, *id)?,
            StmtKind::Continue => return Ok(Flow::Continue),
            StmtKind::Break => return Ok(Flow::Break),
            StmtKind::Fail(message) => return fault(*message),
        }
        Ok(Flow::Next)
    }

    // --- output ---

    fn write(&mut self, text: &str) -> Res<()> {
        self.budget.bytes(text.len())?;
        if let Some(buffer) = self.buffers.last_mut() {
            buffer.push_str(text);
        }
        Ok(())
    }

    fn emit(&mut self, value: &Value) -> Res<()> {
        let text = value.to_text(&mut self.budget)?;
        match self.autoescape && !matches!(value, Value::Str(Str { markup: true, .. })) {
            true => self.write(&html_escape(&text)),
            false => self.write(&text),
        }
    }

    /// Run `body` in a scope of its own and take its text.
    fn capture(&mut self, body: &'p [Stmt]) -> Res<Value> {
        self.buffers.push(String::new());
        let scope = self.scope;
        let result = self.in_scope(scope, |run| run.exec(body));
        let text = self.buffers.pop().unwrap_or_default();
        result?;
        Ok(Value::text(text, self.autoescape))
    }

    fn filtered(&mut self, value: Value, filter: Option<&'p Expr>) -> Res<Value> {
        let Some(filter) = filter else {
            return Ok(value);
        };
        self.captured.push(value);
        let result = self.eval(filter);
        self.captured.pop();
        result
    }

    /// A span runs from what the whole output held when the block had ended, as transformers counts.
    fn generation(&mut self, body: &'p [Stmt]) -> Res<()> {
        let text = self.capture(body)?;
        let start = self.output_chars();
        let end = start + text.len(&mut self.budget)?;
        self.budget.bytes(size_of::<Span<usize>>())?;
        self.spans.push(start..end);
        self.emit(&text)
    }

    fn output_chars(&mut self) -> usize {
        let (bytes, chars) = self.counted;
        let output = &self.buffers[0];
        self.counted = (output.len(), chars + output[bytes..].chars().count());
        self.counted.1
    }

    // --- scopes ---

    fn in_scope<T>(&mut self, parent: usize, inner: impl FnOnce(&mut Self) -> Res<T>) -> Res<T> {
        let outer = self.scope;
        self.scope = self.scopes.len();
        self.budget.bytes(size_of::<Scope>())?;
        self.scopes.push(Scope {
            vars: Vec::new(),
            parent: Some(parent),
            captured: false,
        });
        let result = inner(self);
        if self.scope + 1 == self.scopes.len() && !self.scopes[self.scope].captured {
            self.scopes.pop();
        }
        self.scope = outer;
        result
    }

    fn bind(&mut self, name: u32, value: Value) -> Res<()> {
        let vars = &mut self.scopes[self.scope].vars;
        self.budget.steps(vars.len() / 16)?;
        match vars.iter_mut().find(|(id, _)| *id == name) {
            Some(slot) => slot.1 = value,
            None => vars.push((name, value)),
        }
        Ok(())
    }

    fn closure(&mut self, id: usize) -> Value {
        self.scopes[self.scope].captured = true;
        Value::Macro(Arc::new(Closure {
            id,
            scope: self.scope,
        }))
    }

    fn lookup(&mut self, name: u32) -> Res<Value> {
        let mut at = Some(self.scope);
        while let Some(scope) = at {
            let scope = &self.scopes[scope];
            self.budget.steps(scope.vars.len() / 16)?;
            if let Some((_, value)) = scope.vars.iter().find(|(id, _)| *id == name) {
                return Ok(value.clone());
            }
            at = scope.parent;
        }
        if let Some(Some(value)) = self.context.get(name as usize) {
            return Ok(value.clone());
        }
        let name = &self.program.names[name as usize];
        Ok(match Builtin::named(name) {
            Some(builtin) => Value::Function(builtin),
            None => Value::Undefined(format!("'{name}' is undefined").into()),
        })
    }

    fn assign(&mut self, target: &'p Target, value: Value) -> Res<()> {
        match target {
            Target::Name(name) => self.bind(*name, value)?,
            Target::Attr(object, name) => match self.eval(object)? {
                Value::Namespace(id) => self.set_namespace(id, name, value)?,
                Value::Undefined(message) => return fault(message.to_string()),
                _ => return fault("cannot assign attribute on non-namespace object"),
            },
            Target::Tuple(targets) => {
                let items = value.items(&mut self.budget)?;
                if items.len() != targets.len() {
                    let (wanted, got) = (targets.len(), items.len());
                    return fault(format!(
                        "cannot unpack: expected {wanted} values, got {got}"
                    ));
                }
                for (target, item) in targets.iter().zip(items) {
                    self.assign(target, item)?;
                }
            }
        }
        Ok(())
    }

    pub fn set_namespace(&mut self, id: usize, name: &Arc<str>, value: Value) -> Res<()> {
        if name.starts_with('_') {
            return fault(format!("access to namespace attribute '{name}' is unsafe"));
        }
        self.budget.bytes(size_of::<Value>())?;
        let vars = &mut self.namespaces[id];
        match vars.iter_mut().find(|(n, _)| n == name) {
            Some(slot) => slot.1 = value,
            None => vars.push((name.clone(), value)),
        }
        Ok(())
    }

    // --- statements ---

    fn if_stmt(&mut self, branches: &'p [(Expr, Vec<Stmt>)], otherwise: &'p [Stmt]) -> Res<Flow> {
        for (condition, body) in branches {
            if self.eval(condition)?.truth() {
                return self.exec(body);
            }
        }
        self.exec(otherwise)
    }

    fn with_stmt(&mut self, pairs: &'p [(Target, Expr)], body: &'p [Stmt]) -> Res<Flow> {
        let values = pairs
            .iter()
            .map(|(_, e)| self.eval(e))
            .collect::<Res<Vec<_>>>()?;
        self.in_scope(self.scope, |run| {
            for ((target, _), value) in pairs.iter().zip(values) {
                run.assign(target, value)?;
            }
            run.exec(body)
        })
    }

    fn autoescape_stmt(&mut self, enabled: &'p Expr, body: &'p [Stmt]) -> Res<Flow> {
        let before = self.autoescape;
        self.autoescape = self.eval(enabled)?.truth();
        let result = self.in_scope(self.scope, |run| run.exec(body));
        self.autoescape = before;
        result
    }

    fn for_stmt(&mut self, id: usize) -> Res<()> {
        let items = self
            .eval(&self.program.loops[id].iter)?
            .items(&mut self.budget)?;
        self.run_loop(id, items, 0, self.scope)
    }

    fn run_loop(&mut self, id: usize, items: Vec<Value>, depth: usize, scope: usize) -> Res<()> {
        let program = self.program;
        let node = &program.loops[id];
        let items = self.loop_filter(node, items, scope)?;
        if items.is_empty() {
            return self
                .in_scope(scope, |run| run.exec(&node.otherwise))
                .map(|_| ());
        }
        let items = Value::seq(items, &mut self.budget)?;
        let changed = Mutex::new(None);
        let state = Arc::new(LoopState {
            items,
            index: AtomicUsize::new(0),
            depth,
            id,
            scope,
            changed,
        });
        let loop_name = program.id("loop");
        let mut result = Ok(());
        for (i, item) in state.items.items.iter().enumerate() {
            state.index.store(i, Ordering::Relaxed);
            let flow = self.in_scope(scope, |run| {
                run.budget.steps(1)?;
                if let Some(name) = loop_name {
                    run.bind(name, Value::Loop(state.clone()))?;
                }
                run.assign(&node.target, item.clone())?;
                run.exec(&node.body)
            });
            match flow {
                Ok(Flow::Break) => break,
                Ok(_) => {}
                Err(error) => {
                    result = Err(error);
                    break;
                }
            }
        }
        // A loop could have been given itself to remember.
        *state.changed.lock().unwrap_or_else(PoisonError::into_inner) = None;
        result
    }

    fn loop_filter(&mut self, node: &'p For, items: Vec<Value>, scope: usize) -> Res<Vec<Value>> {
        let Some(filter) = &node.filter else {
            return Ok(items);
        };
        let mut kept = Vec::new();
        for item in items {
            let keep = self.in_scope(scope, |run| {
                run.assign(&node.target, item.clone())?;
                Ok(run.eval(filter)?.truth())
            })?;
            if keep {
                kept.push(item);
            }
        }
        Ok(kept)
    }

    fn call_block(&mut self, call: &'p Expr, id: usize) -> Res<()> {
        let caller = self.closure(id);
        let Expr::Call(function, args) = call else {
            return fault("expected a call in the call block");
        };
        let function = self.eval(function)?;
        let mut args = self.args(args)?;
        args.named.push(("caller".into(), caller));
        let value = self.call(&function, args)?;
        self.emit(&value)
    }

    // --- expressions ---

    pub fn eval(&mut self, expr: &'p Expr) -> Res<Value> {
        match expr {
            Expr::Const(value) => Ok(value.clone()),
            Expr::Name(name) => self.lookup(*name),
            other => self.deeper(|run| run.eval_deep(other)),
        }
    }

    fn eval_deep(&mut self, expr: &'p Expr) -> Res<Value> {
        match expr {
            Expr::Const(value) => Ok(value.clone()),
            Expr::Name(name) => self.lookup(*name),
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
            Expr::Filter(name, input, args) => {
                let input = self.eval(input)?;
                let args = self.args(args)?;
                filters::apply(self, name, input, args)
            }
            Expr::Test(name, input, args) => {
                let input = self.eval(input)?;
                let args = self.args(args)?;
                filters::test(self, name, &input, args).map(Value::Bool)
            }
            Expr::Neg(inner) => negate(&self.eval(inner)?),
            Expr::Not(inner) => Ok(Value::Bool(!self.eval(inner)?.truth())),
            Expr::And(pair) => match self.eval(&pair.0)? {
                left if left.truth() => self.eval(&pair.1),
                left => Ok(left),
            },
            Expr::Or(pair) => match self.eval(&pair.0)? {
                left if left.truth() => Ok(left),
                _ => self.eval(&pair.1),
            },
            Expr::Bin(op, pair) => {
                let (left, right) = (self.eval(&pair.0)?, self.eval(&pair.1)?);
                self.binary(*op, &left, &right)
            }
            Expr::Compare(first, chain) => self.compare(first, chain),
            Expr::If(parts) => match (self.eval(&parts.0)?.truth(), &parts.2) {
                (true, _) => self.eval(&parts.1),
                (false, Some(otherwise)) => self.eval(otherwise),
                (false, None) => Ok(Value::Undefined(
                    "the inline if-expression evaluated to false and no else section was defined."
                        .into(),
                )),
            },
        }
    }

    fn all(&mut self, exprs: &'p [Expr]) -> Res<Vec<Value>> {
        exprs.iter().map(|e| self.eval(e)).collect()
    }

    fn dict(&mut self, pairs: &'p [(Expr, Expr)]) -> Res<Value> {
        let mut out = Vec::with_capacity(pairs.len());
        for (key, value) in pairs {
            out.push((self.eval(key)?, self.eval(value)?));
        }
        Value::dict(out, &mut self.budget)
    }

    fn compare(&mut self, first: &'p Expr, chain: &'p [(Comparison, Expr)]) -> Res<Value> {
        let mut left = self.eval(first)?;
        for (op, right) in chain {
            let right = self.eval(right)?;
            if !compare(*op, &left, &right, &mut self.budget)? {
                return Ok(Value::Bool(false));
            }
            left = right;
        }
        Ok(Value::Bool(true))
    }

    fn args(&mut self, args: &'p Args) -> Res<CallArgs> {
        let mut out = CallArgs {
            positional: self.all(&args.positional)?,
            named: Vec::with_capacity(args.named.len()),
        };
        for (name, expr) in &args.named {
            out.named.push((name.clone(), self.eval(expr)?));
        }
        if let Some(star) = &args.star {
            let more = self.eval(star)?.items(&mut self.budget)?;
            out.positional.extend(more);
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
                out.named.push((key.text.clone(), value.clone()));
            }
        }
        Ok(out)
    }

    fn call_expr(&mut self, function: &'p Expr, args: &'p Args) -> Res<Value> {
        if let Expr::Attr(object, name) = function {
            let object = self.eval(object)?;
            if let Some(name) = methods::find(&object, name) {
                let args = self.args(args)?;
                return methods::call(self, &object, name, args);
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
            Value::Undefined(message) => fault(message.to_string()),
            Value::Function(builtin) => filters::call(self, *builtin, args),
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

    /// A call that can come back to itself: macros, recursive loops, filters that apply filters.
    pub fn nested_call(&mut self, inner: impl FnOnce(&mut Self) -> Res<Value>) -> Res<Value> {
        self.calls += 1;
        if self.calls > MAX_CALLS {
            return fault("maximum recursion depth exceeded");
        }
        let result = inner(self);
        self.calls -= 1;
        result
    }

    fn recurse(&mut self, state: &Arc<LoopState>, args: CallArgs) -> Res<Value> {
        if !self.program.loops[state.id].recursive {
            return fault("The loop must have the 'recursive' marker to be called recursively.");
        }
        let [items] = args.bind("loop", ["iterable"])?;
        let items = items.unwrap_or(Value::None).items(&mut self.budget)?;
        self.buffers.push(String::new());
        let result = self.run_loop(state.id, items, state.depth + 1, state.scope);
        let text = self.buffers.pop().unwrap_or_default();
        result?;
        Ok(Value::text(text, self.autoescape))
    }

    fn call_macro(&mut self, closure: &Closure, args: CallArgs) -> Res<Value> {
        let program = self.program;
        let node = &program.macros[closure.id];
        self.buffers.push(String::new());
        let result = self.in_scope(closure.scope, |run| {
            run.bind_macro(node, args)?;
            run.exec(&node.body)
        });
        let text = self.buffers.pop().unwrap_or_default();
        result?;
        Ok(Value::text(text, self.autoescape))
    }

    /// Arguments by place, then by name, then defaults, which may use the parameters before them.
    fn bind_macro(&mut self, node: &'p Macro, args: CallArgs) -> Res<()> {
        let CallArgs {
            mut positional,
            mut named,
        } = args;
        let extra = positional.split_off(node.params.len().min(positional.len()));
        let mut positional = positional.into_iter();
        for (param, default) in &node.params {
            let name = &self.program.names[*param as usize];
            let given = positional.next().or_else(|| {
                named
                    .iter()
                    .position(|(n, _)| n == name)
                    .map(|i| named.remove(i).1)
            });
            let value = match (given, default) {
                (Some(value), _) => value,
                (None, Some(default)) => self.eval(default)?,
                (None, None) => {
                    Value::Undefined(format!("parameter '{name}' was not provided").into())
                }
            };
            self.bind(*param, value)?;
        }
        let caller = named
            .iter()
            .position(|(n, _)| **n == *"caller")
            .map(|i| named.remove(i).1);
        self.bind_macro_rest(node, extra, named, caller)
    }

    fn bind_macro_rest(
        &mut self,
        node: &'p Macro,
        extra: Vec<Value>,
        named: Vec<(Arc<str>, Value)>,
        caller: Option<Value>,
    ) -> Res<()> {
        let name = &node.name;
        let set = |run: &mut Self, what: &str, value: Value| match run.program.id(what) {
            Some(id) => run.bind(id, value),
            None => Ok(()),
        };
        match (node.caller, caller) {
            (true, None) => set(self, "caller", Value::Undefined("No caller defined".into()))?,
            (true, Some(caller)) => set(self, "caller", caller)?,
            (false, Some(_)) => {
                return fault(format!("macro '{name}' takes no keyword argument 'caller'"));
            }
            (false, None) => {}
        }
        if node.varargs {
            let extra = Value::tuple(extra, &mut self.budget)?;
            set(self, "varargs", extra)?;
        } else if !extra.is_empty() {
            return fault(format!(
                "macro '{name}' takes not more than {} argument(s)",
                node.params.len()
            ));
        }
        if node.kwargs {
            let pairs = named
                .into_iter()
                .map(|(k, v)| (Value::from(&*k), v))
                .collect();
            let kwargs = Value::dict(pairs, &mut self.budget)?;
            set(self, "kwargs", kwargs)?;
        } else if let Some((unknown, _)) = named.first() {
            return fault(format!(
                "macro '{name}' takes no keyword argument '{unknown}'"
            ));
        }
        Ok(())
    }

    // --- attributes, items, slices ---

    /// `object.name`: a method or attribute, else the item of that name, else undefined.
    pub fn attribute(&mut self, object: &Value, name: &str) -> Res<Value> {
        if let Value::Undefined(message) = object {
            return fault(message.to_string());
        }
        if let Some(method) = methods::find(object, name) {
            return Ok(Value::Method(Arc::new((object.clone(), method))));
        }
        if methods::is_unsafe(object, name) {
            let message = format!(
                "access to attribute '{name}' of '{}' object is unsafe.",
                object.type_name()
            );
            return Ok(Value::Undefined(message.into()));
        }
        let found = match object {
            Value::Dict(dict) => dict.get_str(name).cloned(),
            Value::Namespace(id) => {
                let vars = &self.namespaces[*id];
                vars.iter()
                    .find(|(n, _)| **n == *name)
                    .map(|(_, v)| v.clone())
            }
            Value::Loop(state) => loop_attribute(state, name),
            Value::Macro(closure) => self.macro_attribute(closure, name)?,
            // groupby's pairs have names.
            Value::Tuple(pair) if pair.items.len() == 2 && name == "grouper" => {
                Some(pair.items[0].clone())
            }
            Value::Tuple(pair) if pair.items.len() == 2 && name == "list" => {
                Some(pair.items[1].clone())
            }
            Value::Cycler(c) if name == "current" => {
                let at = c.used.load(Ordering::Relaxed) % c.items.items.len().max(1);
                c.items.items.get(at).cloned()
            }
            _ => None,
        };
        Ok(found.unwrap_or_else(|| missing(object, &format!("attribute '{name}'"))))
    }

    fn macro_attribute(&mut self, closure: &Closure, name: &str) -> Res<Option<Value>> {
        let node = &self.program.macros[closure.id];
        Ok(Some(match name {
            "name" => Value::from(&*node.name),
            "catch_kwargs" => Value::Bool(node.kwargs),
            "catch_varargs" => Value::Bool(node.varargs),
            "caller" => Value::Bool(node.caller),
            "arguments" => {
                let names = node
                    .params
                    .iter()
                    .map(|(id, _)| Value::from(&*self.program.names[*id as usize]));
                Value::tuple(names.collect(), &mut self.budget)?
            }
            _ => return Ok(None),
        }))
    }

    /// `object[key]`: the item, else the attribute of that name, else undefined.
    pub fn item(&mut self, object: &Value, key: &Value) -> Res<Value> {
        let found = match (object, key) {
            (Value::Undefined(message), _) => return fault(message.to_string()),
            (Value::Dict(dict), _) => dict.get(key, &mut self.budget).unwrap_or(None).cloned(),
            (Value::List(s) | Value::Tuple(s), _) => {
                index(key, s.items.len()).and_then(|i| s.items.get(i).cloned())
            }
            (Value::Range(r), _) => index(key, r.len()).map(|i| r.at(i)),
            (Value::Str(s), _) if key.as_int().is_some() => {
                self.budget.steps(s.text.len() / 64)?;
                let i = index(key, object.len(&mut self.budget)?);
                i.and_then(|i| s.text.chars().nth(i))
                    .map(|c| Value::text(c.to_string(), s.markup))
            }
            _ => None,
        };
        match (found, key) {
            (Some(value), _) => Ok(value),
            (None, Value::Str(name)) => self.attribute(object, &name.text),
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
                let chars: Vec<char> = s.text.chars().collect();
                let text: String = indices(&mut self.budget)?
                    .into_iter()
                    .map(|i| chars[i])
                    .collect();
                self.budget.bytes(text.len() + 4 * chars.len())?;
                Ok(Value::text(text, s.markup))
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
            Value::Range(r) => {
                let items = indices(&mut self.budget)?
                    .into_iter()
                    .map(|i| r.at(i))
                    .collect();
                Value::list(items, &mut self.budget)
            }
            Value::Undefined(message) => fault(message.to_string()),
            other => fault(format!(
                "'{}' object is not subscriptable",
                other.type_name()
            )),
        }
    }

    // --- operators ---

    pub fn binary(&mut self, op: Op, left: &Value, right: &Value) -> Res<Value> {
        if op == Op::Concat {
            return self.concat(left, right);
        }
        if let Value::Undefined(message) = left {
            return fault(message.to_string());
        }
        if let (Op::Rem, Value::Str(template)) = (op, left) {
            return format::percent(template, right, &mut self.budget);
        }
        if let Value::Undefined(message) = right {
            return fault(message.to_string());
        }
        match (op, left, right) {
            (Op::Add, Value::Str(a), Value::Str(b)) => self.add_text(a, b),
            (Op::Add, Value::List(a), Value::List(b)) => {
                let items = [a.items.as_slice(), &b.items].concat();
                Value::list(items, &mut self.budget)
            }
            (Op::Add, Value::Tuple(a), Value::Tuple(b)) => {
                let items = [a.items.as_slice(), &b.items].concat();
                Value::tuple(items, &mut self.budget)
            }
            (Op::Mul, Value::Str(_) | Value::List(_) | Value::Tuple(_), n)
                if n.as_int().is_some() =>
            {
                self.repeat(left, n)
            }
            (Op::Mul, n, Value::Str(_) | Value::List(_) | Value::Tuple(_))
                if n.as_int().is_some() =>
            {
                self.repeat(right, n)
            }
            _ => arithmetic(op, left, right),
        }
    }

    fn concat(&mut self, left: &Value, right: &Value) -> Res<Value> {
        let (a, b) = (
            left.to_text(&mut self.budget)?,
            right.to_text(&mut self.budget)?,
        );
        self.budget.bytes(a.len() + b.len())?;
        let is_markup = |v: &Value| matches!(v, Value::Str(Str { markup: true, .. }));
        if self.autoescape && (is_markup(left) || is_markup(right)) {
            let escaped = |v: &Value, t: &str| {
                if is_markup(v) {
                    t.to_owned()
                } else {
                    html_escape(t)
                }
            };
            return Ok(Value::text(escaped(left, &a) + &escaped(right, &b), true));
        }
        Ok(Value::from(a.to_string() + &b))
    }

    /// Markup + str escapes the str, whatever autoescape says.
    fn add_text(&mut self, a: &Str, b: &Str) -> Res<Value> {
        self.budget.bytes(a.text.len() + b.text.len())?;
        Ok(match (a.markup, b.markup) {
            (true, false) => Value::text(a.text.to_string() + &html_escape(&b.text), true),
            (false, true) => Value::text(html_escape(&a.text) + &b.text, true),
            (both, _) => Value::text(a.text.to_string() + &b.text, both),
        })
    }

    fn repeat(&mut self, value: &Value, times: &Value) -> Res<Value> {
        let times = usize::try_from(times.as_int().unwrap_or(0).max(0)).unwrap_or(usize::MAX);
        match value {
            Value::Str(s) => {
                self.budget.bytes(s.text.len().saturating_mul(times))?;
                Ok(Value::text(
                    s.text.repeat(if s.text.is_empty() { 0 } else { times }),
                    s.markup,
                ))
            }
            Value::List(s) | Value::Tuple(s) => {
                let each = s.items.len() * size_of::<Value>();
                self.budget.bytes(each.saturating_mul(times))?;
                let times = if s.items.is_empty() { 0 } else { times };
                let items = std::iter::repeat_n(&s.items, times)
                    .flatten()
                    .cloned()
                    .collect();
                match value {
                    Value::Tuple(_) => Value::tuple(items, &mut self.budget),
                    _ => Value::list(items, &mut self.budget),
                }
            }
            other => fault(format!("cannot repeat '{}'", other.type_name())),
        }
    }
}

pub(super) fn compare(
    op: Comparison,
    left: &Value,
    right: &Value,
    budget: &mut Budget,
) -> Res<bool> {
    use std::cmp::Ordering::{Equal, Greater, Less};
    Ok(match op {
        Comparison::Eq => left.equals(right, budget)?,
        Comparison::Ne => !left.equals(right, budget)?,
        Comparison::In => right.contains(left, budget)?,
        Comparison::NotIn => !right.contains(left, budget)?,
        Comparison::Lt => left.compare(right, "<", budget)? == Some(Less),
        Comparison::Gt => left.compare(right, ">", budget)? == Some(Greater),
        Comparison::Le => matches!(left.compare(right, "<=", budget)?, Some(Less | Equal)),
        Comparison::Ge => matches!(left.compare(right, ">=", budget)?, Some(Greater | Equal)),
    })
}

fn negate(value: &Value) -> Res<Value> {
    match value {
        Value::Undefined(message) => fault(message.to_string()),
        Value::Float(f) => Ok(Value::Float(-f)),
        Value::Big(digits) => Value::integer(&match digits.text.strip_prefix('-') {
            Some(positive) => positive.to_owned(),
            None => format!("-{}", digits.text),
        }),
        other => match other.as_int().and_then(i128::checked_neg) {
            Some(i) => Ok(Value::Int(i)),
            None => fault(format!(
                "bad operand type for unary -: '{}'",
                other.type_name()
            )),
        },
    }
}

fn arithmetic(op: Op, left: &Value, right: &Value) -> Res<Value> {
    if let (Some(a), Some(b)) = (left.as_int(), right.as_int()) {
        return int_arithmetic(op, a, b);
    }
    match (left.as_float(), right.as_float()) {
        (Some(a), Some(b)) => float_arithmetic(op, a, b),
        _ => {
            let sign = match op {
                Op::Add => "+",
                Op::Sub => "-",
                Op::Mul => "*",
                Op::Div => "/",
                Op::FloorDiv => "//",
                Op::Rem => "%",
                Op::Pow => "**",
                Op::Concat => "~",
            };
            let (a, b) = (left.type_name(), right.type_name());
            fault(format!(
                "unsupported operand type(s) for {sign}: '{a}' and '{b}'"
            ))
        }
    }
}

fn int_arithmetic(op: Op, a: i128, b: i128) -> Res<Value> {
    if b == 0 && matches!(op, Op::Div | Op::FloorDiv | Op::Rem) {
        return fault("division by zero");
    }
    let result = match op {
        Op::Add => a.checked_add(b),
        Op::Sub => a.checked_sub(b),
        Op::Mul => a.checked_mul(b),
        Op::Div => return Ok(Value::Float(a as f64 / b as f64)),
        Op::FloorDiv => a.checked_div_euclid(b).map(|q| {
            if b < 0 && a.rem_euclid(b) != 0 {
                q - 1
            } else {
                q
            }
        }),
        Op::Rem => a.checked_rem(b).map(|r| {
            if r != 0 && (r < 0) != (b < 0) {
                r + b
            } else {
                r
            }
        }),
        Op::Pow if b < 0 && a == 0 => return fault("0.0 cannot be raised to a negative power"),
        Op::Pow if b < 0 => return Ok(Value::Float((a as f64).powf(b as f64))),
        Op::Pow => u32::try_from(b).ok().and_then(|b| a.checked_pow(b)),
        Op::Concat => None,
    };
    match result {
        Some(i) => Ok(Value::Int(i)),
        None => fault("the result does not fit into 128 bits"),
    }
}

fn float_arithmetic(op: Op, a: f64, b: f64) -> Res<Value> {
    if b == 0.0 && matches!(op, Op::Div | Op::FloorDiv | Op::Rem) {
        return fault("float division by zero");
    }
    let modulo = || {
        let r = a % b;
        if r != 0.0 && (r < 0.0) != (b < 0.0) {
            r + b
        } else if r == 0.0 {
            0.0f64.copysign(b)
        } else {
            r
        }
    };
    Ok(Value::Float(match op {
        Op::Add => a + b,
        Op::Sub => a - b,
        Op::Mul => a * b,
        Op::Div => a / b,
        Op::FloorDiv => ((a - modulo()) / b).round(),
        Op::Rem => modulo(),
        Op::Pow if a == 0.0 && b < 0.0 => return fault("0.0 cannot be raised to a negative power"),
        Op::Pow => a.powf(b),
        Op::Concat => return fault("cannot concatenate numbers"),
    }))
}

/// A Python index into `len` items.
pub(super) fn index(key: &Value, len: usize) -> Option<usize> {
    let i = key.as_int()?;
    let i = if i < 0 { i + len as i128 } else { i };
    usize::try_from(i).ok().filter(|i| *i < len)
}

/// The indices that `[start:stop:step]` takes of `len` items.
fn slice_indices([start, stop, step]: [Option<i128>; 3], len: usize) -> Res<Vec<usize>> {
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
    let (mut at, end) = match step > 0 {
        true => (place(start, low), place(stop, high)),
        false => (place(start, high), place(stop, low)),
    };
    let mut out = Vec::new();
    while (step > 0 && at < end) || (step < 0 && at > end) {
        out.push(at as usize);
        at = at.saturating_add(step);
    }
    Ok(out)
}

/// What a failed lookup gives, with the message its use raises.
fn missing(object: &Value, what: &str) -> Value {
    let owner = match object {
        Value::None => "'None'".to_owned(),
        other => format!("'{} object'", other.type_name()),
    };
    Value::Undefined(format!("{owner} has no {what}").into())
}

fn loop_attribute(state: &Arc<LoopState>, name: &str) -> Option<Value> {
    let (i, len) = (state.index.load(Ordering::Relaxed), state.items.items.len());
    let neighbour = |at: Option<usize>, what: &str| {
        let item = at.and_then(|at| state.items.items.get(at)).cloned();
        item.unwrap_or_else(|| Value::Undefined(format!("there is no {what} item").into()))
    };
    Some(match name {
        "index" => Value::int(i + 1),
        "index0" => Value::int(i),
        "first" => Value::Bool(i == 0),
        "last" => Value::Bool(i + 1 == len),
        "length" => Value::int(len),
        "revindex" => Value::int(len - i),
        "revindex0" => Value::int(len - i - 1),
        "depth" => Value::int(state.depth + 1),
        "depth0" => Value::int(state.depth),
        "previtem" => neighbour(i.checked_sub(1), "previous"),
        "nextitem" => neighbour(Some(i + 1), "next"),
        _ => return None,
    })
}

/// An error the template raised itself.
pub(super) fn thrown(message: String) -> Box<Fault> {
    Box::new(Fault {
        message,
        thrown: true,
        line: None,
    })
}
