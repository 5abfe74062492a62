//! Runs a compiled template: statements, functions and loops, within a budget. Expressions: `eval`.

use std::ops::Range as Span;
use std::sync::{Arc, Mutex, PoisonError};

use super::clock::Now;
use super::filters::{self, sequence};
use super::globals::Builtin;
use super::origin::{Str, Text};
use super::program::{
    Args, Body, Condition, Enter, Expr, For, Function, Program, Stmt, StmtKind, Target,
};
use super::value::{
    Budget, Closure, Fault, LoopState, Res, Source, Turn, Value, fault, html_escape,
};

/// Deepest nesting of evaluation, over macros and recursive loops too; keeps within a thread's stack.
const MAX_NESTING: usize = 700;
/// Deepest nesting of macro calls and recursive loops.
const MAX_CALLS: usize = 100;
/// Largest range, as Jinja2's sandbox has it, and longest string or list from `*`.
pub(super) const MAX_RANGE: usize = 100_000;

/// Evaluated call arguments.
#[derive(Default, Debug)]
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

    /// The same arguments for one more call.
    pub fn again(&self, budget: &mut Budget) -> Res<CallArgs> {
        budget.bytes((self.positional.len() + self.named.len()) * size_of::<Value>())?;
        Ok(CallArgs {
            positional: self.positional.clone(),
            named: self.named.clone(),
        })
    }
}

/// The variables of a function that runs, or that a macro defined in it may still ask for.
struct Frame {
    slots: Vec<Option<Value>>,
    parent: usize,
    captured: bool,
}

enum Flow {
    Next,
    Break,
    Continue,
}

/// What a render gives.
pub(super) struct Rendered {
    pub text: Text,
    /// Where the generation blocks lie, in code points.
    pub spans: Vec<Span<usize>>,
}

/// One render.
pub(super) struct Run<'p> {
    pub(super) program: &'p Program,
    pub budget: Budget,
    pub now: Option<Now>,
    /// The caller's variables, by name id.
    context: Vec<Option<Value>>,
    frames: Vec<Frame>,
    at: usize,
    pub(super) captured: Vec<Value>,
    /// The output, and above it the texts being captured.
    buffers: Vec<Text>,
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
            frames: Vec::new(),
            at: 0,
            captured: Vec::new(),
            buffers: vec![Text::with_capacity(4096)],
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

    /// Give a variable by its name's id.
    pub fn define_id(&mut self, id: u32, value: Value) {
        self.context[id as usize] = Some(value);
    }

    /// Run the whole template.
    pub fn finish(mut self) -> Res<Rendered> {
        let program = self.program;
        if let Some(root) = program.functions.first() {
            self.in_function(root.slots, 0, |run| run.body(&root.body))?;
        }
        Ok(Rendered {
            text: self.buffers.swap_remove(0),
            spans: self.spans,
        })
    }

    /// One level down: everything that recurses goes through here.
    #[inline]
    pub(super) fn deeper<T>(&mut self, inner: impl FnOnce(&mut Self) -> Res<T>) -> Res<T> {
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
            StmtKind::Emit(expr) => self.emit_expr(expr)?,
            StmtKind::EmitAs(escapes, expr) => {
                let before = std::mem::replace(&mut self.autoescape, *escapes);
                let done = self.emit_expr(expr);
                self.autoescape = before;
                done?;
            }
            StmtKind::For(id) => self.for_stmt(*id)?,
            StmtKind::If(branches, otherwise) => return self.if_stmt(branches, otherwise),
            StmtKind::With(pairs, body) => return self.with_stmt(pairs, body),
            StmtKind::Set(target, expr) => {
                let value = self.eval(expr)?;
                self.assign(target, value)?;
            }
            StmtKind::SetBlock(target, filter, body) => {
                return self.set_block(target, filter.as_ref(), body);
            }
            StmtKind::AutoEscape(enabled, body) => return self.autoescape_stmt(enabled, body),
            StmtKind::FilterBlock(filter, body) => {
                let (value, flow) = self.capture(body)?;
                if matches!(flow, Flow::Next) {
                    let value = self.filtered(value, Some(filter))?;
                    self.emit_text(&value)?;
                }
                return Ok(flow);
            }
            StmtKind::Generation(id) => self.generation(*id)?,
            StmtKind::Block(id) => {
                let function = &self.program.functions[*id];
                // Jinja2 compiles it apart from what stands around it.
                let before = std::mem::replace(&mut self.autoescape, false);
                let done = self.in_function(function.slots, 0, |run| run.body(&function.body));
                self.autoescape = before;
                done?;
            }
            StmtKind::Macro(id, slot) => {
                let name = self.program.functions[*id].name.clone();
                let closure = self.closure(*id, Some(name));
                self.set_slot(*slot, closure);
            }
            StmtKind::CallBlock(call, id) => self.call_block(call, *id)?,
            StmtKind::Export(names) => {
                for (name, slot) in names {
                    let value = self.frames[self.at].slots[*slot as usize].clone();
                    if value.is_some() {
                        self.context[*name as usize] = value;
                    }
                }
            }
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
            buffer.own(text);
        }
        Ok(())
    }

    fn write_str(&mut self, text: &Str) -> Res<()> {
        self.budget.bytes(text.text.len())?;
        if let Some(buffer) = self.buffers.last_mut() {
            buffer.str(text);
        }
        Ok(())
    }

    fn emit(&mut self, value: &Value) -> Res<()> {
        match value {
            Value::Str(s) if !self.autoescape => return self.write_str(s),
            Value::Undefined(_) => return Ok(()),
            _ => {}
        }
        let s = value.to_str(&mut self.budget)?;
        if !self.autoescape || s.markup {
            return self.write_str(&s);
        }
        let escaped = s.made_into(html_escape(&s.text));
        self.write_str(&escaped)
    }

    /// What a filter block or a call block made goes out as it is: it must be text.
    fn emit_text(&mut self, value: &Value) -> Res<()> {
        match value {
            Value::Str(s) => self.write_str(s),
            other => fault(format!(
                "expected str instance, {} found",
                other.type_name()
            )),
        }
    }

    /// Write a plain text that is there already; false where there is none.
    fn emit_known(&mut self, expr: &'p Expr) -> Res<bool> {
        match look(&self.frames, self.at, &self.context, expr) {
            Some(Value::Str(s)) if !s.markup && !self.autoescape => {
                self.budget.bytes(s.text.len())?;
                if let Some(buffer) = self.buffers.last_mut() {
                    buffer.str(s);
                }
                Ok(true)
            }
            _ => Ok(false),
        }
    }

    fn emit_expr(&mut self, expr: &'p Expr) -> Res<()> {
        if self.emit_known(expr)? {
            return Ok(());
        }
        match expr {
            Expr::Sum(parts) if !self.autoescape => self.emit_sum(parts),
            Expr::Filter(_, name, input, args) if !self.autoescape && **name == *"tojson" => {
                self.emit_json(input, args)
            }
            // Whether put together first or not: the same text.
            Expr::Concat(parts) => {
                for part in parts {
                    let value = self.eval(part)?;
                    self.emit(&value)?;
                }
                Ok(())
            }
            expr => {
                let value = self.eval(expr)?;
                self.emit(&value)
            }
        }
    }

    /// Write `input | tojson` where it is made.
    fn emit_json(&mut self, input: &'p Expr, args: &'p Args) -> Res<()> {
        let input = self.eval(input)?;
        let args = self.args(args)?;
        let json = filters::json_options(args, &mut self.budget)?;
        match self.buffers.last_mut() {
            Some(out) => json.write(&input, 0, out, &mut self.budget),
            None => Ok(()),
        }
    }

    /// Write `a + b + c` as long as all are plain text; anything else is added up as usual.
    fn emit_sum(&mut self, parts: &'p [Expr]) -> Res<()> {
        let buffer = self.buffers.len() - 1;
        let start = self.buffers[buffer].text.len();
        for (i, part) in parts.iter().enumerate() {
            if self.emit_known(part)? {
                continue;
            }
            match self.eval(part)? {
                Value::Str(s) if !s.markup => self.write_str(&s)?,
                other => {
                    let sum = match i {
                        0 => other,
                        _ => {
                            let left = self.buffers[buffer].take_from(start);
                            self.add(&Value::Str(left), &other)?
                        }
                    };
                    let sum = self.sum_from(sum, &parts[i + 1..])?;
                    return self.emit(&sum);
                }
            }
        }
        Ok(())
    }

    /// Run `body` and take its text.
    fn capture(&mut self, body: &'p Body) -> Res<(Value, Flow)> {
        self.buffers.push(Text::default());
        let flow = self.body(body);
        let text = self.buffers.pop().unwrap_or_default();
        Ok((Value::Str(text.finish(self.autoescape)), flow?))
    }

    fn set_block(
        &mut self,
        target: &'p Target,
        filter: Option<&'p Expr>,
        body: &'p Body,
    ) -> Res<Flow> {
        let (value, flow) = self.capture(body)?;
        if matches!(flow, Flow::Next) {
            let value = self.filtered(value, filter)?;
            let value = match self.autoescape {
                true => Value::Str(Str {
                    markup: true,
                    ..value.to_str(&mut self.budget)?
                }),
                false => value,
            };
            self.assign(target, value)?;
        }
        Ok(flow)
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
    fn generation(&mut self, id: usize) -> Res<()> {
        let function = &self.program.functions[id];
        let parent = self.at;
        let text = self.function_text(function, parent, |run| {
            run.bind_macro(function, CallArgs::default())
        })?;
        let start = self.output_chars();
        let end = start + text.len(&mut self.budget)?;
        self.budget.bytes(size_of::<Span<usize>>())?;
        self.spans.push(start..end);
        self.emit(&text)
    }

    fn output_chars(&mut self) -> usize {
        let (bytes, chars) = self.counted;
        let output = &self.buffers[0].text;
        self.counted = (output.len(), chars + output[bytes..].chars().count());
        self.counted.1
    }

    // --- variables ---

    /// Run something with variables of its own.
    fn in_function<T>(
        &mut self,
        slots: u32,
        parent: usize,
        inner: impl FnOnce(&mut Self) -> Res<T>,
    ) -> Res<T> {
        let outer = self.at;
        self.open(slots, parent)?;
        let result = inner(self);
        self.close();
        self.at = outer;
        result
    }

    fn open(&mut self, slots: u32, parent: usize) -> Res<()> {
        self.budget
            .bytes(size_of::<Frame>() + slots as usize * size_of::<Value>())?;
        self.at = self.frames.len();
        self.frames.push(Frame {
            slots: vec![None; slots as usize],
            parent,
            captured: false,
        });
        Ok(())
    }

    /// Forget the running function's variables, unless something may ask for them.
    fn close(&mut self) {
        if self.at + 1 == self.frames.len() && !self.frames[self.at].captured {
            self.frames.pop();
        }
    }

    fn body(&mut self, body: &'p Body) -> Res<Flow> {
        self.enter(&body.enter);
        let flow = self.exec(&body.stmts);
        self.leave(&body.leave);
        flow
    }

    fn enter(&mut self, enter: &'p [(u32, Enter)]) {
        for (slot, from) in enter {
            let value = match from {
                Enter::Empty => None,
                Enter::Copy(place) => self.slot(place.out, place.slot).cloned(),
                Enter::Global(name) => self.global(*name),
            };
            self.frames[self.at].slots[*slot as usize] = value;
        }
    }

    fn leave(&mut self, leave: &'p [u32]) {
        for slot in leave {
            self.frames[self.at].slots[*slot as usize] = None;
        }
    }

    /// The value of a variable, or of an entry of a dict in one, if it is there to be looked at.
    pub(super) fn peek<'v>(&'v self, expr: &'v Expr) -> Option<&'v Value> {
        look(&self.frames, self.at, &self.context, expr)
    }

    pub(super) fn slot(&self, out: u32, slot: u32) -> Option<&Value> {
        let mut at = self.at;
        for _ in 0..out {
            at = self.frames[at].parent;
        }
        self.frames[at].slots.get(slot as usize)?.as_ref()
    }

    fn set_slot(&mut self, slot: u32, value: Value) {
        self.frames[self.at].slots[slot as usize] = Some(value);
    }

    /// The caller's variable, or the function that has this name.
    pub(super) fn global(&self, name: u32) -> Option<Value> {
        if let Some(value) = &self.context[name as usize] {
            return Some(value.clone());
        }
        Builtin::named(&self.program.names[name as usize]).map(Value::Function)
    }

    fn closure(&mut self, id: usize, name: Option<Arc<str>>) -> Value {
        self.frames[self.at].captured = true;
        let scope = self.at;
        Value::Macro(Arc::new(Closure { name, id, scope }))
    }

    fn assign(&mut self, target: &'p Target, value: Value) -> Res<()> {
        match target {
            Target::Slot(slot) => self.set_slot(*slot, value),
            Target::Attr(object, name) => match self.eval(object)? {
                Value::Namespace(id) => self.set_namespace(id, name, value)?,
                Value::Undefined(missing) => return missing.fault(),
                _ => return fault("cannot assign attribute on non-namespace object"),
            },
            Target::Tuple(targets) => {
                let items = self.items(&value)?;
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
        let known = self.budget.namespaces[id].len();
        self.budget.steps(known / 16)?;
        let vars = &mut self.budget.namespaces[id];
        match vars.iter_mut().find(|(n, _)| n == name) {
            Some(slot) => slot.1 = value,
            None => {
                vars.push((name.clone(), value));
                self.budget.bytes(size_of::<Value>())?;
            }
        }
        Ok(())
    }

    // --- statements ---

    fn if_stmt(&mut self, branches: &'p [(Expr, Vec<Stmt>)], otherwise: &'p [Stmt]) -> Res<Flow> {
        for (condition, body) in branches {
            if self.truth(condition)? {
                return self.exec(body);
            }
        }
        self.exec(otherwise)
    }

    fn with_stmt(&mut self, pairs: &'p [(Target, Expr)], body: &'p Body) -> Res<Flow> {
        let values = pairs
            .iter()
            .map(|(_, e)| self.eval(e))
            .collect::<Res<Vec<_>>>()?;
        self.enter(&body.enter);
        for ((target, _), value) in pairs.iter().zip(values) {
            self.assign(target, value)?;
        }
        let flow = self.exec(&body.stmts);
        self.leave(&body.leave);
        flow
    }

    fn autoescape_stmt(&mut self, enabled: &'p Expr, body: &'p Body) -> Res<Flow> {
        let before = self.autoescape;
        self.enter(&body.enter);
        self.autoescape = self.truth(enabled)?;
        let flow = self.exec(&body.stmts);
        self.autoescape = before;
        self.leave(&body.leave);
        flow
    }

    fn call_block(&mut self, call: &'p Expr, id: usize) -> Res<()> {
        let caller = self.closure(id, None);
        let Expr::Call(function, args) = call else {
            return fault("expected a call in the call block");
        };
        let function = self.eval(function)?;
        let mut args = self.args(args)?;
        args.named.push(("caller".into(), caller));
        let value = self.call(&function, args)?;
        self.emit_text(&value)
    }

    // --- loops ---

    fn for_stmt(&mut self, id: usize) -> Res<()> {
        let program = self.program;
        let node = &program.loops[id];
        let items = self.eval(&node.iter)?;
        if node.recursive.is_some() {
            return self.run_recursive(id, items, 0, self.at);
        }
        self.run_loop(id, items, 0, self.at)
    }

    /// A loop that can be called has variables of its own each time.
    fn run_recursive(&mut self, id: usize, items: Value, depth: usize, scope: usize) -> Res<()> {
        let slots = self.program.loops[id].recursive.unwrap_or(0);
        self.frames[scope].captured = true;
        self.in_function(slots, scope, |run| run.run_loop(id, items, depth, scope))
    }

    fn run_loop(&mut self, id: usize, items: Value, depth: usize, scope: usize) -> Res<()> {
        let program = self.program;
        let node = &program.loops[id];
        let mut source = self.source(&items)?;
        if let Some(condition) = &node.filter {
            source = self.with_condition(source, id, condition, scope)?;
        }
        let ran = match node.loop_slot {
            None => self.turns(node, source)?,
            Some(slot) => {
                let len = match &source {
                    Source::Items(items) => Some(items.len()),
                    Source::Seq(seq, _) => Some(seq.items.len()),
                    _ => None,
                };
                let state = Arc::new(LoopState {
                    depth,
                    id,
                    scope,
                    turn: Mutex::new(Turn {
                        source,
                        len,
                        index: 0,
                        before: None,
                        current: None,
                        after: None,
                    }),
                    changed: Mutex::new(None),
                    nests: items.depth(),
                });
                let ran = self.turns_with_loop(node, slot, &state);
                // A loop could have been given itself to remember.
                *state.changed.lock().unwrap_or_else(PoisonError::into_inner) = None;
                ran?
            }
        };
        match ran {
            true => Ok(()),
            false => self.body(&node.otherwise).map(|_| ()),
        }
    }

    /// Did a turn come to its end? (A turn that was left is none, to `else`.)
    fn turns(&mut self, node: &'p For, mut source: Source) -> Res<bool> {
        let mut ran = false;
        while let Some(item) = self.pull(&mut source)? {
            match self.turn(node, item)? {
                Flow::Break => break,
                Flow::Continue => {}
                Flow::Next => ran = true,
            }
        }
        self.leave(&node.body.leave);
        Ok(ran)
    }

    fn turns_with_loop(&mut self, node: &'p For, slot: u32, state: &Arc<LoopState>) -> Res<bool> {
        let mut ran = false;
        let mut first = true;
        self.set_slot(slot, Value::Loop(state.clone()));
        while let Some(item) = self.next_turn(state, first)? {
            first = false;
            match self.turn(node, item)? {
                Flow::Break => break,
                Flow::Continue => {}
                Flow::Next => ran = true,
            }
        }
        self.leave(&node.body.leave);
        Ok(ran)
    }

    fn turn(&mut self, node: &'p For, item: Value) -> Res<Flow> {
        self.budget.steps(1)?;
        self.assign(&node.target, item)?;
        self.enter(&node.body.enter);
        self.exec(&node.body.stmts)
    }

    fn next_turn(&mut self, state: &LoopState, first: bool) -> Res<Option<Value>> {
        let mut turn = state.turn();
        let item = match (turn.after.take(), &mut turn.source) {
            (Some(item), _) => Some(item),
            (None, source @ (Source::Seq(..) | Source::Items(_))) => self.pull(source)?,
            _ => {
                drop(turn);
                let item = self.pull_turn(state)?;
                turn = state.turn();
                item
            }
        };
        if let Some(item) = &item {
            turn.before = turn.current.replace(item.clone());
            turn.index += usize::from(!first);
        }
        Ok(item)
    }

    fn pull_turn(&mut self, state: &LoopState) -> Res<Option<Value>> {
        let nothing = Source::Items(Vec::new().into_iter());
        let mut source = std::mem::replace(&mut state.turn().source, nothing);
        let item = self.pull(&mut source);
        state.turn().source = source;
        item
    }

    /// Look at the item after the current one.
    pub(super) fn peek_turn(&mut self, state: &LoopState) -> Res<Option<Value>> {
        if let Some(item) = &state.turn().after {
            return Ok(Some(item.clone()));
        }
        let item = self.pull_turn(state)?;
        state.turn().after.clone_from(&item);
        Ok(item)
    }

    /// How many items the loop has; those to come are made for it.
    pub(super) fn count_turns(&mut self, state: &LoopState) -> Res<usize> {
        if let Some(len) = state.turn().len {
            return Ok(len);
        }
        let mut rest = Vec::new();
        while let Some(item) = self.pull_turn(state)? {
            self.budget.bytes(size_of::<Value>())?;
            rest.push(item);
        }
        let mut turn = state.turn();
        let len = turn.index + 1 + usize::from(turn.after.is_some()) + rest.len();
        (turn.source, turn.len) = (Source::Items(rest.into_iter()), Some(len));
        Ok(len)
    }

    // --- items ---

    /// Where the items of a value come from.
    pub(super) fn source(&mut self, value: &Value) -> Res<Source> {
        Ok(match value {
            Value::List(seq) | Value::Tuple(seq) => Source::Seq(seq.clone(), 0),
            Value::Iter(iter) => Source::Shared(iter.clone()),
            other => Source::Items(other.items(&mut self.budget)?.into_iter()),
        })
    }

    /// The next item, made now where it is not there yet.
    pub(super) fn pull(&mut self, source: &mut Source) -> Res<Option<Value>> {
        match source {
            Source::Items(items) => Ok(items.next()),
            Source::Seq(seq, at) => {
                *at += 1;
                Ok(seq.items.get(*at - 1).cloned())
            }
            Source::Shared(iter) => {
                let mut inner = iter.take();
                let item = self.deeper(|run| run.pull(&mut inner));
                iter.put(inner);
                item
            }
            Source::Made(from, job) => loop {
                let Some(item) = self.deeper(|run| run.pull(from))? else {
                    return Ok(None);
                };
                if let Some(made) = sequence::work(self, job, item)? {
                    return Ok(Some(made));
                }
            },
            Source::Filtered(from, id, frame) => loop {
                let Some(item) = self.deeper(|run| run.pull(from))? else {
                    return Ok(None);
                };
                if self.passes(*id, *frame, item.clone())? {
                    return self
                        .repacked(&self.program.loops[*id].target, item)
                        .map(Some);
                }
            },
            Source::Failing(message) => fault(message.clone()),
        }
    }

    fn with_condition(
        &mut self,
        source: Source,
        id: usize,
        condition: &'p Condition,
        scope: usize,
    ) -> Res<Source> {
        let outer = self.at;
        self.open(condition.slots, scope)?;
        let frame = self.at;
        self.frames[frame].captured = true;
        self.enter(&condition.enter);
        self.at = outer;
        Ok(Source::Filtered(Box::new(source), id, frame))
    }

    /// What passed a condition goes on as its targets: several names are a tuple, whatever they were taken from.
    fn repacked(&mut self, target: &'p Target, item: Value) -> Res<Value> {
        let Target::Tuple(targets) = target else {
            return Ok(item);
        };
        let items = self.items(&item)?;
        let parts = targets.iter().zip(items);
        let parts: Res<Vec<_>> = parts
            .map(|(target, item)| self.repacked(target, item))
            .collect();
        Value::tuple(parts?, &mut self.budget)
    }

    fn passes(&mut self, id: usize, frame: usize, item: Value) -> Res<bool> {
        let program = self.program;
        let Some(condition) = &program.loops[id].filter else {
            return Ok(true);
        };
        let outer = std::mem::replace(&mut self.at, frame);
        let passes = self
            .assign(&condition.target, item)
            .and_then(|()| self.truth(&condition.test));
        self.at = outer;
        passes
    }

    /// What `for x in value` walks over.
    pub fn items(&mut self, value: &Value) -> Res<Vec<Value>> {
        let Value::Iter(_) = value else {
            return value.items(&mut self.budget);
        };
        let mut source = self.source(value)?;
        let mut items = Vec::new();
        while let Some(item) = self.pull(&mut source)? {
            self.budget.bytes(size_of::<Value>())?;
            items.push(item);
        }
        Ok(items)
    }

    /// A generator as a list, for those who cannot make its items.
    pub fn settle(&mut self, value: &mut Value) -> Res<()> {
        if matches!(value, Value::Iter(_)) {
            let items = self.items(value)?;
            *value = Value::list(items, &mut self.budget)?;
        }
        Ok(())
    }

    // --- calls ---

    /// A call that can come back to itself: macros, recursive loops, filters that apply filters.
    pub fn nested_call<T>(&mut self, inner: impl FnOnce(&mut Self) -> Res<T>) -> Res<T> {
        self.calls += 1;
        if self.calls > MAX_CALLS {
            return fault("maximum recursion depth exceeded");
        }
        let result = inner(self);
        self.calls -= 1;
        result
    }

    pub(super) fn recurse(&mut self, state: &LoopState, args: CallArgs) -> Res<Value> {
        if self.program.loops[state.id].recursive.is_none() {
            return fault("The loop must have the 'recursive' marker to be called recursively.");
        }
        let [items] = args.bind("loop", ["iterable"])?;
        let items = items.unwrap_or(Value::None);
        self.buffers.push(Text::default());
        let result = self.run_recursive(state.id, items, state.depth + 1, state.scope);
        let text = self.buffers.pop().unwrap_or_default();
        result?;
        Ok(Value::Str(text.finish(self.autoescape)))
    }

    pub(super) fn call_macro(&mut self, closure: &Closure, args: CallArgs) -> Res<Value> {
        let program = self.program;
        let function = &program.functions[closure.id];
        self.function_text(function, closure.scope, |run| {
            run.bind_macro(function, args)
        })
    }

    /// The text that a function makes.
    fn function_text(
        &mut self,
        function: &'p Function,
        parent: usize,
        bind: impl FnOnce(&mut Self) -> Res<()>,
    ) -> Res<Value> {
        self.buffers.push(Text::default());
        let result = self.in_function(function.slots, parent, |run| {
            run.enter(&function.body.enter);
            bind(run)?;
            run.exec(&function.body.stmts)
        });
        let text = self.buffers.pop().unwrap_or_default();
        result?;
        Ok(Value::Str(text.finish(self.autoescape)))
    }

    /// Arguments by place, then by name, then defaults, which may use the parameters before them.
    fn bind_macro(&mut self, function: &'p Function, args: CallArgs) -> Res<()> {
        let CallArgs {
            mut positional,
            mut named,
        } = args;
        let count = function.params.len();
        let extra = positional.split_off(count.min(positional.len()));
        let mut given: Vec<Option<Value>> = positional.into_iter().map(Some).collect();
        for param in &function.params[given.len()..] {
            let at = named.iter().position(|(n, _)| *n == param.name);
            given.push(at.map(|i| named.remove(i).1));
        }
        self.bind_macro_rest(function, extra, named)?;
        for (param, value) in function.params.iter().zip(given) {
            let value = match (value, &param.default) {
                (Some(value), _) => value,
                (None, Some(default)) => self.eval(default)?,
                (None, None) => Value::no_parameter(&param.name),
            };
            self.set_slot(param.slot, value);
        }
        Ok(())
    }

    fn bind_macro_rest(
        &mut self,
        function: &'p Function,
        extra: Vec<Value>,
        mut named: Vec<(Arc<str>, Value)>,
    ) -> Res<()> {
        let name = &function.name;
        if let Some(slot) = function.caller {
            let at = named.iter().position(|(n, _)| **n == *"caller");
            let caller = at.map(|i| named.remove(i).1);
            let is_param = function.params.iter().any(|p| p.slot == slot);
            if !is_param {
                let none = || Value::undefined("No caller defined");
                self.set_slot(slot, caller.unwrap_or_else(none));
            }
        }
        if let Some(slot) = function.kwargs {
            let pairs = named.into_iter();
            let pairs = pairs.map(|(k, v)| (Str::from(k).into(), v)).collect();
            let kwargs = Value::dict(pairs, &mut self.budget)?;
            self.set_slot(slot, kwargs);
        } else if let Some((unknown, _)) = named.first() {
            return fault(format!(
                "macro '{name}' takes no keyword argument '{unknown}'"
            ));
        }
        if let Some(slot) = function.varargs {
            let extra = Value::tuple(extra, &mut self.budget)?;
            self.set_slot(slot, extra);
        } else if !extra.is_empty() {
            return fault(format!(
                "macro '{name}' takes not more than {} argument(s)",
                function.params.len()
            ));
        }
        Ok(())
    }
}

/// See [`Run::peek`]: apart from the run, so that the rest of it can be changed meanwhile.
fn look<'v>(
    frames: &'v [Frame],
    at: usize,
    context: &'v [Option<Value>],
    expr: &'v Expr,
) -> Option<&'v Value> {
    match expr {
        Expr::Const(value) => Some(value),
        Expr::Slot(place, _) => {
            let mut at = at;
            for _ in 0..place.out {
                at = frames[at].parent;
            }
            frames[at].slots.get(place.slot as usize)?.as_ref()
        }
        Expr::Global(name) => context.get(*name as usize)?.as_ref(),
        Expr::Item(parts) => match (look(frames, at, context, &parts.0)?, &parts.1) {
            (Value::Dict(dict), Expr::Const(Value::Str(key))) => dict.get_str(&key.text),
            _ => None,
        },
        Expr::Attr(object, name) => match look(frames, at, context, object)? {
            object @ Value::Dict(dict) if name.method.is_none_or(|method| !method.of(object)) => {
                dict.get_str(&name.text)
            }
            _ => None,
        },
        _ => None,
    }
}

/// An error the template raised itself.
pub(super) fn thrown(message: String) -> Box<Fault> {
    Box::new(Fault {
        message,
        thrown: true,
        line: None,
    })
}
