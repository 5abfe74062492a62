//! Which variable a name means, by Jinja2's rules: decided once for each scope, before it runs.
//!
//! A scope's names are gathered in the order they are read and set. A name read first is looked up
//! around the scope; one that is set first is empty until then, even where the caller gave a variable
//! of that name; one that is set in a branch of an `if` keeps what it had. Functions (macros, call
//! blocks, loops that call themselves) see the variables around them as they are when they run.

use std::collections::HashMap;

use minijinja::machinery::ast::{CallArg, Expr, Stmt};

use super::program::{Enter, Place};

/// How a slot of a scope begins.
#[derive(Clone, Copy, PartialEq)]
enum Load {
    /// It is given: a loop's target, a macro's parameter.
    Given,
    /// From the caller's variables.
    Global,
    Copy(usize, u32),
    Empty,
}

struct Known {
    slot: u32,
    load: Load,
    set: bool,
}

/// The names of one scope.
struct Scope {
    function: usize,
    level: u32,
    parent: Option<usize>,
    known: HashMap<u32, Known>,
    /// Names in the order they became known.
    order: Vec<u32>,
}

/// A function's slots, shared by scopes of one level that are not open at once.
struct Slots {
    parent: Option<usize>,
    taken: HashMap<(u32, u32), u32>,
}

/// What a name that is read means.
pub(super) enum Meaning {
    Slot(Place),
    Global,
}

/// All scopes of a template.
#[derive(Default)]
pub(super) struct Names {
    scopes: Vec<Scope>,
    functions: Vec<Slots>,
}

/// Gives names their ids.
pub(super) type Intern<'i> = &'i mut dyn FnMut(&str) -> u32;

impl Names {
    /// A new function: `parent` is the one it was written in, where it sees that one's variables.
    pub fn function(&mut self, parent: Option<usize>) -> usize {
        self.functions.push(Slots {
            parent,
            taken: HashMap::new(),
        });
        self.functions.len() - 1
    }

    /// A new scope in `function`, inside `parent`.
    pub fn scope(&mut self, function: usize, parent: Option<usize>) -> usize {
        self.scopes.push(Scope {
            function,
            level: parent.map_or(0, |p| self.scopes[p].level + 1),
            parent,
            known: HashMap::new(),
            order: Vec::new(),
        });
        self.scopes.len() - 1
    }

    /// The function that a scope is in.
    pub fn function_of(&self, scope: usize) -> usize {
        self.scopes[scope].function
    }

    /// How many slots a function needs.
    pub fn slots(&self, function: usize) -> u32 {
        self.functions[function].taken.len() as u32
    }

    fn learn(&mut self, scope: usize, name: u32, load: Load, set: bool) -> u32 {
        let (function, level) = (self.scopes[scope].function, self.scopes[scope].level);
        let taken = &mut self.functions[function].taken;
        let next = taken.len() as u32;
        let slot = *taken.entry((level, name)).or_insert(next);
        let scope = &mut self.scopes[scope];
        scope.known.insert(name, Known { slot, load, set });
        scope.order.push(name);
        slot
    }

    /// Where a name is known, looking outwards from `scope`.
    fn find(&self, scope: Option<usize>, name: u32) -> Option<usize> {
        let mut at = scope;
        while let Some(scope) = at {
            if self.scopes[scope].known.contains_key(&name) {
                return Some(scope);
            }
            at = self.scopes[scope].parent;
        }
        None
    }

    /// A name that the scope is given.
    pub fn give(&mut self, scope: usize, name: u32) -> u32 {
        match self.scopes[scope].known.get_mut(&name) {
            Some(known) => {
                (known.load, known.set) = (Load::Given, true);
                known.slot
            }
            None => self.learn(scope, name, Load::Given, true),
        }
    }

    fn read(&mut self, scope: usize, name: u32) {
        if self.find(Some(scope), name).is_none() {
            self.learn(scope, name, Load::Global, false);
        }
    }

    fn set(&mut self, scope: usize, name: u32, in_branch: bool) {
        let outer = |names: &Names| {
            let at = names.find(names.scopes[scope].parent, name)?;
            Some(Load::Copy(at, names.scopes[at].known.get(&name)?.slot))
        };
        let otherwise = if in_branch { Load::Global } else { Load::Empty };
        match self.scopes[scope].known.get(&name).map(|known| known.set) {
            Some(true) => {}
            Some(false) => {
                let load = in_branch.then(|| outer(self)).flatten();
                if let Some(known) = self.scopes[scope].known.get_mut(&name) {
                    known.set = true;
                    known.load = load.unwrap_or(known.load);
                }
            }
            None => {
                let load = outer(self).unwrap_or(otherwise);
                self.learn(scope, name, load, true);
            }
        }
    }

    /// What a name means in `scope`, whose statements were gathered before.
    pub fn meaning(&self, scope: usize, name: u32) -> Meaning {
        let Some(at) = self.find(Some(scope), name) else {
            return Meaning::Global;
        };
        match self.scopes[at].known.get(&name) {
            Some(known) if known.set || known.load != Load::Global => {
                Meaning::Slot(self.place(scope, at, known.slot))
            }
            _ => Meaning::Global,
        }
    }

    /// The slot of a name that `scope` itself sets.
    pub fn slot(&self, scope: usize, name: u32) -> Option<u32> {
        self.scopes[scope].known.get(&name).map(|known| known.slot)
    }

    fn place(&self, from: usize, at: usize, slot: u32) -> Place {
        let (mut function, target) = (self.scopes[from].function, self.scopes[at].function);
        let mut out = 0;
        while function != target {
            let Some(parent) = self.functions[function].parent else {
                break;
            };
            (function, out) = (parent, out + 1);
        }
        Place { out, slot }
    }

    /// What the slots of `scope` hold when it begins, and which are emptied when it ends.
    pub fn edges(&self, scope: usize) -> (Vec<(u32, Enter)>, Vec<u32>) {
        let (mut enter, mut leave) = (Vec::new(), Vec::new());
        for name in &self.scopes[scope].order {
            let Some(known) = self.scopes[scope].known.get(name) else {
                continue;
            };
            match known.load {
                Load::Global if !known.set => continue,
                Load::Given => {}
                Load::Global => enter.push((known.slot, Enter::Global(*name))),
                Load::Empty => enter.push((known.slot, Enter::Empty)),
                Load::Copy(at, slot) => {
                    let outer = self.scopes[at].known.get(name);
                    // A name that is only read out there has no slot that is filled.
                    let from = match outer.is_some_and(|k| k.load == Load::Global && !k.set) {
                        true => Enter::Global(*name),
                        false => Enter::Copy(self.place(scope, at, slot)),
                    };
                    enter.push((known.slot, from));
                }
            }
            leave.push(known.slot);
        }
        (enter, leave)
    }

    // --- gathering ---

    /// Gather the names of statements, in their order.
    pub fn gather(&mut self, scope: usize, stmts: &[Stmt<'_>], intern: Intern<'_>) {
        self.stmts(scope, stmts, false, intern);
    }

    fn stmts(&mut self, scope: usize, stmts: &[Stmt<'_>], in_branch: bool, intern: Intern<'_>) {
        for stmt in stmts {
            self.stmt(scope, stmt, in_branch, intern);
        }
    }

    fn stmt(&mut self, scope: usize, stmt: &Stmt<'_>, in_branch: bool, intern: Intern<'_>) {
        match stmt {
            Stmt::EmitExpr(emit) => self.reads(scope, &emit.expr, intern),
            Stmt::ForLoop(node) => self.reads(scope, &node.iter, intern),
            Stmt::IfCond(node) => {
                self.reads(scope, &node.expr, intern);
                self.stmts(scope, &node.true_body, true, intern);
                self.stmts(scope, &node.false_body, true, intern);
            }
            Stmt::WithBlock(node) => {
                for (_, value) in &node.assignments {
                    self.reads(scope, value, intern);
                }
            }
            Stmt::Set(node) => {
                self.reads(scope, &node.expr, intern);
                self.target(scope, &node.target, in_branch, intern);
            }
            Stmt::SetBlock(node) => self.target(scope, &node.target, in_branch, intern),
            Stmt::FilterBlock(node) => self.reads(scope, &node.filter, intern),
            Stmt::Macro(node) => {
                let name = intern(node.name);
                self.set(scope, name, in_branch);
            }
            Stmt::CallBlock(node) => {
                self.reads(scope, &node.call.expr, intern);
                self.args(scope, &node.call.args, intern);
            }
            _ => {}
        }
    }

    /// Gather the names that a target sets.
    pub fn target(&mut self, scope: usize, target: &Expr<'_>, in_branch: bool, intern: Intern<'_>) {
        match target {
            Expr::Var(var) => {
                let name = intern(var.id);
                self.set(scope, name, in_branch);
            }
            Expr::List(list) => {
                for item in &list.items {
                    self.target(scope, item, in_branch, intern);
                }
            }
            Expr::Tuple(tuple) => {
                for item in &tuple.items {
                    self.target(scope, item, in_branch, intern);
                }
            }
            other => self.reads(scope, other, intern),
        }
    }

    /// The names in a loop's target are given to its scope.
    pub fn give_target(&mut self, scope: usize, target: &Expr<'_>, intern: Intern<'_>) {
        match target {
            Expr::Var(var) => {
                let name = intern(var.id);
                self.give(scope, name);
            }
            Expr::List(list) => {
                for item in &list.items {
                    self.give_target(scope, item, intern);
                }
            }
            Expr::Tuple(tuple) => {
                for item in &tuple.items {
                    self.give_target(scope, item, intern);
                }
            }
            other => self.reads(scope, other, intern),
        }
    }

    /// Gather the names that an expression reads.
    pub fn reads(&mut self, scope: usize, expr: &Expr<'_>, intern: Intern<'_>) {
        each_name(expr, &mut |name| {
            let name = intern(name);
            self.read(scope, name);
        });
    }

    fn args(&mut self, scope: usize, args: &[CallArg<'_>], intern: Intern<'_>) {
        for arg in args {
            match arg {
                CallArg::Pos(e) | CallArg::Kwarg(_, e) => self.reads(scope, e, intern),
                CallArg::PosSplat(e) | CallArg::KwargSplat(e) => self.reads(scope, e, intern),
            }
        }
    }
}

/// Call `see` with each name that an expression reads. Chains are walked, not recursed into: nothing
/// has looked at how deep they are yet.
pub(super) fn each_name(expr: &Expr<'_>, see: &mut dyn FnMut(&str)) {
    let mut next = Some(expr);
    while let Some(expr) = next.take() {
        match expr {
            Expr::Var(var) => see(var.id),
            Expr::Const(_) => {}
            Expr::List(list) => list.items.iter().for_each(|e| each_name(e, see)),
            Expr::Tuple(tuple) => tuple.items.iter().for_each(|e| each_name(e, see)),
            Expr::Map(map) => {
                map.keys.iter().for_each(|e| each_name(e, see));
                map.values.iter().for_each(|e| each_name(e, see));
            }
            Expr::GetAttr(node) => next = Some(&node.expr),
            Expr::GetItem(node) => {
                each_name(&node.subscript_expr, see);
                next = Some(&node.expr);
            }
            Expr::Slice(node) => {
                for part in [&node.start, &node.stop, &node.step].into_iter().flatten() {
                    each_name(part, see);
                }
                next = Some(&node.expr);
            }
            Expr::Call(node) => {
                each_arg(&node.args, see);
                next = Some(&node.expr);
            }
            Expr::Filter(node) => {
                each_arg(&node.args, see);
                next = node.expr.as_ref();
            }
            Expr::Test(node) => {
                each_arg(&node.args, see);
                next = Some(&node.expr);
            }
            Expr::UnaryOp(node) => next = Some(&node.expr),
            Expr::BinOp(node) => {
                each_name(&node.right, see);
                next = Some(&node.left);
            }
            Expr::Compare(node) => {
                node.ops.iter().for_each(|op| each_name(&op.expr, see));
                next = Some(&node.expr);
            }
            Expr::IfExpr(node) => {
                each_name(&node.test_expr, see);
                each_name(&node.true_expr, see);
                next = node.false_expr.as_ref();
            }
        }
    }
}

fn each_arg(args: &[CallArg<'_>], see: &mut dyn FnMut(&str)) {
    for arg in args {
        match arg {
            CallArg::Pos(e) | CallArg::Kwarg(_, e) => each_name(e, see),
            CallArg::PosSplat(e) | CallArg::KwargSplat(e) => each_name(e, see),
        }
    }
}

/// Call `see` with each name that statements read, in all scopes of theirs but blocks; `set` with
/// each that they set.
pub(super) fn each_use(stmts: &[Stmt<'_>], see: &mut dyn FnMut(&str, bool)) {
    for stmt in stmts {
        let mut read = |expr: &Expr<'_>| each_name(expr, &mut |name| see(name, false));
        match stmt {
            Stmt::EmitExpr(node) => read(&node.expr),
            Stmt::ForLoop(node) => {
                targets(&node.target, see);
                let mut read = |expr: &Expr<'_>| each_name(expr, &mut |name| see(name, false));
                read(&node.iter);
                node.filter_expr.iter().for_each(read);
                each_use(&node.body, see);
                each_use(&node.else_body, see);
            }
            Stmt::IfCond(node) => {
                read(&node.expr);
                each_use(&node.true_body, see);
                each_use(&node.false_body, see);
            }
            Stmt::WithBlock(node) => {
                for (target, value) in &node.assignments {
                    targets(target, see);
                    each_name(value, &mut |name| see(name, false));
                }
                each_use(&node.body, see);
            }
            Stmt::Set(node) => {
                targets(&node.target, see);
                each_name(&node.expr, &mut |name| see(name, false));
            }
            Stmt::SetBlock(node) => {
                targets(&node.target, see);
                node.filter
                    .iter()
                    .for_each(|e| each_name(e, &mut |name| see(name, false)));
                each_use(&node.body, see);
            }
            Stmt::AutoEscape(node) => {
                read(&node.enabled);
                each_use(&node.body, see);
            }
            Stmt::FilterBlock(node) => {
                each_use(&node.body, see);
                each_name(&node.filter, &mut |name| see(name, false));
            }
            Stmt::Macro(node) => {
                node.args.iter().for_each(|arg| targets(arg, see));
                for value in &node.defaults {
                    each_name(value, &mut |name| see(name, false));
                }
                each_use(&node.body, see);
            }
            Stmt::CallBlock(node) => {
                each_name(&node.call.expr, &mut |name| see(name, false));
                each_arg(&node.call.args, &mut |name| see(name, false));
                node.macro_decl
                    .args
                    .iter()
                    .for_each(|arg| targets(arg, see));
                each_use(&node.macro_decl.body, see);
            }
            _ => {}
        }
    }
}

fn targets(target: &Expr<'_>, see: &mut dyn FnMut(&str, bool)) {
    match target {
        Expr::Var(var) => see(var.id, true),
        Expr::List(list) => list.items.iter().for_each(|t| targets(t, see)),
        Expr::Tuple(tuple) => tuple.items.iter().for_each(|t| targets(t, see)),
        other => each_name(other, &mut |name| see(name, false)),
    }
}

/// Call `see` with each name that a target sets.
pub(super) fn target_names(target: &Expr<'_>, see: &mut dyn FnMut(&str)) {
    targets(target, &mut |name, set| {
        if set {
            see(name);
        }
    });
}
