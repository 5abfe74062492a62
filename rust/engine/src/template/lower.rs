//! Template text -> program. minijinja's lexer and parser read it; names become slots (`names`),
//! filters, tests and methods are looked up once.

use std::sync::Arc;

use minijinja::machinery::ast::{self, BinOpKind, CompareOpKind, UnaryOpKind};
use minijinja::machinery::{Span, parse};

use super::checks;
use super::filters;
use super::names::{Meaning, Names, each_use, target_names};
use super::program::{
    Args, Body, Comparison, Condition, Expr, For, Function, Name, Op, Param, Program, Stmt,
    StmtKind, Target,
};
use super::teach::{syntax, teach};
use super::value::{Budget, Fault, Res, Value, fault};

/// Larger sources are refused; the largest real chat templates have some 30 kB.
const MAX_SOURCE: usize = 1 << 20;
/// Deepest expression or block nesting.
const MAX_NESTING: usize = 120;
/// The filter that stands for `{% generation %}`.
const GENERATION: &str = "generation";

/// Compile `source`, or say what is wrong with it and in which line.
pub(super) fn compile(name: &str, source: &str) -> Res<Program> {
    if source.len() > MAX_SOURCE {
        return fault(format!(
            "template has {} bytes, at most {MAX_SOURCE} are accepted",
            source.len()
        ));
    }
    // Jinja2's lexer reads \r\n and \r as \n.
    let source = source.replace("\r\n", "\n").replace('\r', "\n");
    let config = syntax()?;
    let source = teach(&source, &config)?;
    let tree = parse(&source, name, config).map_err(|error| syntax_fault(&error))?;
    let ast::Stmt::Template(template) = &tree else {
        return fault("the parser gave no template");
    };
    let mut lowering = Lowering {
        source: &source,
        program: Program::default(),
        names: Names::default(),
        at: At::default(),
        nesting: 0,
        has_blocks: source.contains("block"),
        unsure: false,
        escapes: false,
    };
    lowering.template(&template.children)?;
    Ok(lowering.program)
}

fn syntax_fault(error: &minijinja::Error) -> Box<Fault> {
    let message = error
        .detail()
        .map_or_else(|| error.to_string(), str::to_owned);
    let line = error.line().map(|l| l as u32);
    fault_at(message, line)
}

fn fault_at(message: String, line: Option<u32>) -> Box<Fault> {
    Box::new(Fault {
        message,
        thrown: false,
        line,
    })
}

/// Where in the template lowering is.
#[derive(Clone, Copy, Default)]
struct At {
    scope: usize,
    /// Inside a loop of this function: `break` and `continue` have a meaning.
    in_loop: bool,
    /// Outside of all scopes but the template's: what is set here, blocks see.
    top: bool,
    /// Inside any loop: `loop` cannot be set.
    loops: bool,
    /// In a branch: an unknown filter or test is an error only where it is reached.
    soft: bool,
}

struct Lowering<'s> {
    source: &'s str,
    program: Program,
    names: Names,
    at: At,
    nesting: usize,
    has_blocks: bool,
    /// Within an `autoescape` whose condition is only known as it runs; and what was last known before.
    unsure: bool,
    escapes: bool,
}

/// A name's id, given on first sight.
fn intern(program: &mut Program, name: &str) -> u32 {
    if let Some(&id) = program.ids.get(name) {
        return id;
    }
    let id = program.names.len() as u32;
    let name: Arc<str> = name.into();
    program.names.push(name.clone());
    program.ids.insert(name, id);
    program.reads.push(false);
    id
}

impl Lowering<'_> {
    fn deeper<T>(&mut self, line: u32, inner: impl FnOnce(&mut Self) -> Res<T>) -> Res<T> {
        self.nesting += 1;
        if self.nesting > MAX_NESTING {
            let message = format!("nests deeper than {MAX_NESTING}");
            return Err(fault_at(message, Some(line)));
        }
        let result = inner(self);
        self.nesting -= 1;
        result.map_err(|mut fault| {
            fault.line = fault.line.or(Some(line));
            fault
        })
    }

    fn id(&mut self, name: &str) -> u32 {
        intern(&mut self.program, name)
    }

    fn template(&mut self, stmts: &[ast::Stmt<'_>]) -> Res<()> {
        // The template's own place among the functions is the first.
        self.program.functions.push(Function::empty("template"));
        let function = self.names.function(None);
        self.at.scope = self.names.scope(function, None);
        self.at.top = true;
        let body = self.body(stmts)?;
        let slots = self.names.slots(function);
        let root = &mut self.program.functions[0];
        (root.body, root.slots) = (body, slots);
        Ok(())
    }

    // --- scopes ---

    /// Statements in the scope that `at` names; what is given to it was given before.
    fn body(&mut self, stmts: &[ast::Stmt<'_>]) -> Res<Body> {
        let program = &mut self.program;
        self.names
            .gather(self.at.scope, stmts, &mut |name| intern(program, name));
        let stmts = self.block(stmts)?;
        let (enter, leave) = self.names.edges(self.at.scope);
        Ok(Body {
            enter,
            stmts,
            leave,
        })
    }

    /// Go on in a new scope of this function.
    fn inner<T>(&mut self, lower: impl FnOnce(&mut Self) -> Res<T>) -> Res<T> {
        let before = self.at;
        let function = self.names.function_of(before.scope);
        self.at.scope = self.names.scope(function, Some(before.scope));
        (self.at.top, self.at.soft) = (false, false);
        let result = lower(self);
        self.at = before;
        result
    }

    /// Go on in a branch.
    fn soft<T>(&mut self, lower: impl FnOnce(&mut Self) -> Res<T>) -> Res<T> {
        let before = self.at;
        self.at.soft = true;
        let result = lower(self);
        self.at = before;
        result
    }

    /// Go on in a new function, which sees the variables around it if `sees` is set.
    fn function<T>(
        &mut self,
        sees: bool,
        lower: impl FnOnce(&mut Self, usize) -> Res<T>,
    ) -> Res<T> {
        let before = self.at;
        let (parent, around) = match sees {
            true => (
                Some(self.names.function_of(before.scope)),
                Some(before.scope),
            ),
            false => (None, None),
        };
        let function = self.names.function(parent);
        self.at = At {
            scope: self.names.scope(function, around),
            loops: before.loops,
            ..At::default()
        };
        let result = lower(self, function);
        self.at = before;
        result
    }

    // --- statements ---

    fn block(&mut self, stmts: &[ast::Stmt<'_>]) -> Res<Vec<Stmt>> {
        let mut out = Vec::with_capacity(stmts.len());
        for stmt in stmts {
            let line = stmt_line(stmt);
            let kind = self.deeper(line, |l| l.stmt(stmt))?;
            out.push(Stmt { line, kind });
            self.export(stmt, line, &mut out);
        }
        Ok(out)
    }

    /// What the template itself sets, blocks see.
    fn export(&mut self, stmt: &ast::Stmt<'_>, line: u32, out: &mut Vec<Stmt>) {
        if !self.has_blocks || !self.at.top {
            return;
        }
        let mut names = Vec::new();
        let mut note = |name: &str| names.push(name.to_owned());
        match stmt {
            ast::Stmt::Set(s) => target_names(&s.target, &mut note),
            ast::Stmt::SetBlock(s) => target_names(&s.target, &mut note),
            ast::Stmt::Macro(m) => note(m.name),
            _ => return,
        }
        let mut exported = Vec::new();
        for name in names {
            let id = self.id(&name);
            exported.extend(self.names.slot(self.at.scope, id).map(|slot| (id, slot)));
        }
        out.push(Stmt {
            line,
            kind: StmtKind::Export(exported),
        });
    }

    fn stmt(&mut self, stmt: &ast::Stmt<'_>) -> Res<StmtKind> {
        Ok(match stmt {
            ast::Stmt::Template(t) => {
                return self
                    .inner(|l| l.body(&t.children))
                    .map(|b| StmtKind::With(Vec::new(), b));
            }
            ast::Stmt::EmitRaw(raw) => StmtKind::Text(self.raw_text(raw.raw, raw.span()).into()),
            ast::Stmt::EmitExpr(e) => match self.expr(&e.expr)? {
                // Jinja2 makes text of constants as it compiles.
                expr if self.unsure && is_constant(&expr) => StmtKind::EmitAs(self.escapes, expr),
                expr => StmtKind::Emit(expr),
            },
            ast::Stmt::ForLoop(f) => self.for_loop(f)?,
            ast::Stmt::IfCond(i) => self.if_chain(i)?,
            ast::Stmt::WithBlock(w) => self.with_block(w)?,
            ast::Stmt::Set(s) => {
                let value = self.expr(&s.expr)?;
                StmtKind::Set(self.target(&s.target)?, value)
            }
            ast::Stmt::SetBlock(s) => {
                let (filter, body) = self.inner(|l| {
                    let body = l.body(&s.body)?;
                    let filter = s.filter.as_ref().map(|f| l.expr(f)).transpose()?;
                    Ok((filter, body))
                })?;
                StmtKind::SetBlock(self.target(&s.target)?, filter, body)
            }
            ast::Stmt::AutoEscape(a) => self.inner(|l| {
                let program = &mut l.program;
                let scope = l.at.scope;
                l.names
                    .reads(scope, &a.enabled, &mut |name| intern(program, name));
                let enabled = l.expr(&a.enabled)?;
                let before = (l.unsure, l.escapes);
                match &enabled {
                    Expr::Const(value) => l.escapes = value.truth(),
                    _ => l.unsure = true,
                }
                let body = l.body(&a.body);
                (l.unsure, l.escapes) = before;
                Ok(StmtKind::AutoEscape(enabled, body?))
            })?,
            ast::Stmt::FilterBlock(f) => match &f.filter {
                ast::Expr::Filter(name) if name.name == GENERATION && name.expr.is_none() => {
                    StmtKind::Generation(self.generation(&f.body)?)
                }
                filter => {
                    let (filter, body) = self.inner(|l| {
                        let body = l.body(&f.body)?;
                        Ok((l.expr(filter)?, body))
                    })?;
                    StmtKind::FilterBlock(filter, body)
                }
            },
            ast::Stmt::Block(b) => StmtKind::Block(self.named_block(&b.body)?),
            ast::Stmt::Macro(m) => {
                let function = self.macro_(m)?;
                let name = self.id(m.name);
                let Some(slot) = self.names.slot(self.at.scope, name) else {
                    return fault(format!("macro '{}' has no place", m.name));
                };
                StmtKind::Macro(function, slot)
            }
            ast::Stmt::CallBlock(c) => {
                let call = self.call(&c.call)?;
                StmtKind::CallBlock(call, self.macro_(&c.macro_decl)?)
            }
            ast::Stmt::Continue(_) | ast::Stmt::Break(_) if !self.at.in_loop => {
                return fault("'break' and 'continue' are for loops");
            }
            ast::Stmt::Continue(_) => StmtKind::Continue,
            ast::Stmt::Break(_) => StmtKind::Break,
            ast::Stmt::Import(_)
            | ast::Stmt::FromImport(_)
            | ast::Stmt::Extends(_)
            | ast::Stmt::Include(_) => StmtKind::Fail("no loader for this environment specified"),
            ast::Stmt::Do(_) => return fault("Encountered unknown tag 'do'."),
        })
    }

    /// The text between tags. minijinja trims the newline after `{% raw %}`, Jinja2 does not.
    fn raw_text(&self, raw: &str, span: Span) -> String {
        let before = &self.source[..span.start_offset as usize];
        let after = &self.source[span.start_offset as usize..];
        let opens_raw = before
            .strip_suffix("%}")
            .and_then(|s| s.rfind("{%").map(|at| &s[at + 2..]));
        let is_raw =
            opens_raw.is_some_and(|tag| tag.trim_start_matches(['-', '+']).trim() == "raw");
        let end = after
            .find("endraw")
            .and_then(|end| after[..end].rfind("{%"));
        let whole = &after[..end.unwrap_or(after.len())];
        let trimmed = match whole.trim().is_empty() {
            true => whole.len() > raw.len(),
            false => whole.trim_end().len() > raw.trim_end().len(),
        };
        match is_raw && after.starts_with('\n') && trimmed {
            true => format!("\n{raw}"),
            false => raw.to_owned(),
        }
    }

    fn with_block(&mut self, w: &ast::WithBlock<'_>) -> Res<StmtKind> {
        let mut values = Vec::new();
        for (_, value) in &w.assignments {
            values.push(self.expr(value)?);
        }
        self.inner(|l| {
            for (target, _) in &w.assignments {
                let program = &mut l.program;
                let scope = l.at.scope;
                l.names
                    .target(scope, target, false, &mut |name| intern(program, name));
            }
            let body = l.body(&w.body)?;
            let mut pairs = Vec::new();
            for ((target, _), value) in w.assignments.iter().zip(values) {
                pairs.push((l.target(target)?, value));
            }
            Ok(StmtKind::With(pairs, body))
        })
    }

    fn for_loop(&mut self, f: &ast::ForLoop<'_>) -> Res<StmtKind> {
        let (mut reads_loop, mut sets_loop) = (false, false);
        each_use(&f.body, &mut |name, set| {
            reads_loop |= name == "loop" && !set;
            sets_loop |= name == "loop" && set;
        });
        target_names(&f.target, &mut |name| sets_loop |= name == "loop");
        if sets_loop {
            return fault("Can't assign to special loop variable in for-loop.");
        }
        let iter = self.expr(&f.iter)?;
        let filter = f.filter_expr.as_ref();
        let filter = filter
            .map(|test| self.condition(&f.target, test))
            .transpose()?;
        let reads_loop = reads_loop || f.recursive;
        let lowered = match f.recursive {
            false => self.loop_parts(f, iter, filter, reads_loop)?,
            true => self.function(true, |l, function| {
                let mut parts = l.loop_parts(f, iter, filter, reads_loop)?;
                parts.recursive = Some(l.names.slots(function));
                Ok(parts)
            })?,
        };
        self.program.loops.push(lowered);
        Ok(StmtKind::For(self.program.loops.len() - 1))
    }

    fn loop_parts(
        &mut self,
        f: &ast::ForLoop<'_>,
        iter: Expr,
        filter: Option<Condition>,
        reads_loop: bool,
    ) -> Res<For> {
        let (in_loop, loops) = (self.at.in_loop, self.at.loops);
        let (target, loop_slot, body) = self.inner(|l| {
            (l.at.in_loop, l.at.loops) = (true, true);
            let scope = l.at.scope;
            let loop_name = l.id("loop");
            let loop_slot = reads_loop.then(|| l.names.give(scope, loop_name));
            let program = &mut l.program;
            l.names
                .give_target(scope, &f.target, &mut |name| intern(program, name));
            let body = l.body(&f.body)?;
            Ok((l.target(&f.target)?, loop_slot, body))
        })?;
        let otherwise = self.inner(|l| {
            (l.at.in_loop, l.at.loops) = (in_loop, loops);
            l.body(&f.else_body)
        })?;
        Ok(For {
            iter,
            filter,
            target,
            loop_slot,
            body,
            otherwise,
            recursive: None,
        })
    }

    fn condition(&mut self, target: &ast::Expr<'_>, test: &ast::Expr<'_>) -> Res<Condition> {
        self.function(true, |l, function| {
            let scope = l.at.scope;
            let program = &mut l.program;
            l.names
                .give_target(scope, target, &mut |name| intern(program, name));
            l.names
                .reads(scope, test, &mut |name| intern(program, name));
            let target = l.target(target)?;
            let test = l.expr(test)?;
            let (enter, _) = l.names.edges(scope);
            Ok(Condition {
                slots: l.names.slots(function),
                target,
                enter,
                test,
            })
        })
    }

    /// `elif` comes as an `if` in the else branch: flat again.
    fn if_chain(&mut self, first: &ast::IfCond<'_>) -> Res<StmtKind> {
        self.soft(|l| l.branches(first))
    }

    fn branches(&mut self, first: &ast::IfCond<'_>) -> Res<StmtKind> {
        let mut branches = Vec::new();
        let mut current = first;
        loop {
            branches.push((self.expr(&current.expr)?, self.block(&current.true_body)?));
            match current.false_body.as_slice() {
                [ast::Stmt::IfCond(next)] => current = next,
                rest => return Ok(StmtKind::If(branches, self.block(rest)?)),
            }
        }
    }

    fn named_block(&mut self, stmts: &[ast::Stmt<'_>]) -> Res<usize> {
        let made = self.function(false, |l, function| {
            let body = l.body(stmts)?;
            Ok(Function {
                body,
                slots: l.names.slots(function),
                ..Function::empty("block")
            })
        })?;
        self.program.functions.push(made);
        Ok(self.program.functions.len() - 1)
    }

    /// To Jinja2 the body of a call block, with the names `caller`, `kwargs` and `varargs` of one.
    fn generation(&mut self, stmts: &[ast::Stmt<'_>]) -> Res<usize> {
        let made = self.function(true, |l, function| {
            l.macro_function(("caller", &[], &[]), stmts, function)
        })?;
        self.program.functions.push(made);
        Ok(self.program.functions.len() - 1)
    }

    fn macro_(&mut self, m: &ast::Macro<'_>) -> Res<usize> {
        let made = self.function(true, |l, function| {
            l.macro_function((m.name, &m.args, &m.defaults), &m.body, function)
        })?;
        self.program.functions.push(made);
        Ok(self.program.functions.len() - 1)
    }

    fn macro_function(
        &mut self,
        (name, args, defaults): (&str, &[ast::Expr<'_>], &[ast::Expr<'_>]),
        stmts: &[ast::Stmt<'_>],
        function: usize,
    ) -> Res<Function> {
        let scope = self.at.scope;
        let undefaulted = args.len() - defaults.len().min(args.len());
        let mut names: Vec<(&str, u32)> = Vec::new();
        for arg in args {
            let ast::Expr::Var(var) = arg else {
                return fault("macro parameters must be names");
            };
            let id = self.id(var.id);
            if names.iter().any(|(name, ..)| *name == var.id) {
                return fault(format!("duplicate argument '{}' in macro", var.id));
            }
            names.push((var.id, self.names.give(scope, id)));
        }
        let given = |name: &str| names.iter().position(|(n, _)| *n == name);
        let reads = specials(stmts);
        let special = |l: &mut Self, i: usize, name: &str| {
            let wanted = reads[i] && given(name).is_none();
            let id = l.id(name);
            wanted.then(|| l.names.give(scope, id))
        };
        let caller = special(self, 0, "caller");
        let kwargs = special(self, 1, "kwargs");
        let varargs = special(self, 2, "varargs");
        if reads[0] && given("caller").is_some_and(|at| at < undefaulted) {
            return fault(
                "When defining macros or call blocks the special \"caller\" argument must be \
                 omitted or be given a default.",
            );
        }
        let explicit = given("caller").filter(|_| reads[0]).map(|at| names[at].1);
        let program = &mut self.program;
        for default in defaults {
            self.names
                .reads(scope, default, &mut |name| intern(program, name));
        }
        let body = self.body(stmts)?;
        let mut params = Vec::new();
        for (i, (name, slot)) in names.into_iter().enumerate() {
            let default = i
                .checked_sub(undefaulted)
                .map(|d| self.expr(&defaults[d]))
                .transpose()?;
            params.push(Param {
                name: name.into(),
                slot,
                default,
            });
        }
        Ok(Function {
            name: name.into(),
            params,
            slots: self.names.slots(function),
            body,
            varargs,
            kwargs,
            caller: caller.or(explicit),
        })
    }

    fn target(&mut self, target: &ast::Expr<'_>) -> Res<Target> {
        Ok(match target {
            ast::Expr::Var(v) => {
                let id = self.id(v.id);
                if v.id == "loop" && self.at.loops {
                    return fault("Can't assign to special loop variable in for-loop.");
                }
                match self.names.slot(self.at.scope, id) {
                    Some(slot) => Target::Slot(slot),
                    None => return fault(format!("'{}' has no place", v.id)),
                }
            }
            ast::Expr::GetAttr(a) => Target::Attr(self.expr(&a.expr)?, a.name.into()),
            ast::Expr::List(l) => {
                Target::Tuple(l.items.iter().map(|t| self.target(t)).collect::<Res<_>>()?)
            }
            ast::Expr::Tuple(t) => {
                Target::Tuple(t.items.iter().map(|t| self.target(t)).collect::<Res<_>>()?)
            }
            other => return fault(format!("can't assign to '{}'", other.description())),
        })
    }

    // --- expressions ---

    fn boxed(&mut self, e: &ast::Expr<'_>) -> Res<Box<Expr>> {
        Ok(Box::new(self.expr(e)?))
    }
    fn pair(&mut self, a: &ast::Expr<'_>, b: &ast::Expr<'_>) -> Res<Box<(Expr, Expr)>> {
        Ok(Box::new((self.expr(a)?, self.expr(b)?)))
    }
    fn exprs(&mut self, all: &[ast::Expr<'_>]) -> Res<Vec<Expr>> {
        all.iter().map(|e| self.expr(e)).collect()
    }
    fn optional(&mut self, e: Option<&ast::Expr<'_>>) -> Res<Option<Expr>> {
        e.map(|e| self.expr(e)).transpose()
    }

    fn expr(&mut self, e: &ast::Expr<'_>) -> Res<Expr> {
        self.deeper(e.span().start_line.into(), |l| l.expr_kind(e))
    }

    fn expr_kind(&mut self, e: &ast::Expr<'_>) -> Res<Expr> {
        Ok(match e {
            ast::Expr::Var(v) => self.name(v.id),
            ast::Expr::Const(c) => Expr::Const(constant(&c.value)?),
            ast::Expr::List(l) => Expr::List(self.exprs(&l.items)?),
            ast::Expr::Tuple(t) => Expr::Tuple(self.exprs(&t.items)?),
            ast::Expr::Map(m) => Expr::Dict(
                m.keys
                    .iter()
                    .zip(&m.values)
                    .map(|(k, v)| Ok((self.expr(k)?, self.expr(v)?)))
                    .collect::<Res<_>>()?,
            ),
            ast::Expr::GetAttr(a) => Expr::Attr(self.boxed(&a.expr)?, Name::new(a.name)),
            ast::Expr::GetItem(i) => Expr::Item(self.pair(&i.expr, &i.subscript_expr)?),
            ast::Expr::Slice(s) => {
                let parts = [
                    self.optional(s.start.as_ref())?,
                    self.optional(s.stop.as_ref())?,
                    self.optional(s.step.as_ref())?,
                ];
                Expr::Slice(Box::new((self.expr(&s.expr)?, parts)))
            }
            ast::Expr::Call(c) => self.call(c)?,
            ast::Expr::Filter(f) => {
                let input = f
                    .expr
                    .as_ref()
                    .map_or(Ok(Expr::Captured), |e| self.expr(e))?;
                let (filter, args) = (filters::named(f.name), self.args(&f.args)?);
                if filter.is_none() && !self.at.soft {
                    return filters::unknown(f.name);
                }
                Expr::Filter(filter, f.name.into(), Box::new(input), args)
            }
            ast::Expr::Test(t) => {
                let test = checks::named(t.name);
                if test.is_none() && !self.at.soft {
                    return checks::unknown(t.name);
                }
                let tested = self.boxed(&t.expr)?;
                // `x is odd -1` takes one from what the test says.
                if let [ast::CallArg::Pos(arg @ ast::Expr::UnaryOp(minus))] = t.args.as_slice()
                    && self.is_bare_minus(arg.span().start_offset as usize)
                {
                    let tested = Expr::Test(test, t.name.into(), tested, Args::default());
                    let pair = Box::new((tested, self.expr(&minus.expr)?));
                    return Ok(Expr::Bin(Op::Sub, pair));
                }
                Expr::Test(test, t.name.into(), tested, self.args(&t.args)?)
            }
            ast::Expr::UnaryOp(u) => match u.op {
                UnaryOpKind::Not => Expr::Not(self.boxed(&u.expr)?),
                UnaryOpKind::Neg => Expr::Neg(self.boxed(&u.expr)?),
            },
            ast::Expr::BinOp(b) => self.binary(b)?,
            ast::Expr::Compare(c) => {
                let mut chain = Vec::with_capacity(c.ops.len());
                for op in &c.ops {
                    chain.push((comparison(op.op), self.expr(&op.expr)?));
                }
                Expr::Compare(self.boxed(&c.expr)?, chain)
            }
            ast::Expr::IfExpr(i) => self.soft(|l| {
                Ok(Expr::If(Box::new((
                    l.expr(&i.test_expr)?,
                    l.expr(&i.true_expr)?,
                    l.optional(i.false_expr.as_ref())?,
                ))))
            })?,
        })
    }

    /// Does a minus stand here, without a bracket before it?
    fn is_bare_minus(&self, at: usize) -> bool {
        let (before, after) = self.source.split_at(at);
        after.starts_with('-') && !before.trim_end().ends_with('(')
    }

    fn name(&mut self, name: &str) -> Expr {
        let id = self.id(name);
        self.program.reads[id as usize] = true;
        match self.names.meaning(self.at.scope, id) {
            Meaning::Slot(place) => Expr::Slot(place, id),
            Meaning::Global => Expr::Global(id),
        }
    }

    fn binary(&mut self, b: &ast::BinOp<'_>) -> Res<Expr> {
        let op = match b.op {
            BinOpKind::ScAnd => return Ok(Expr::And(self.pair(&b.left, &b.right)?)),
            BinOpKind::ScOr => return Ok(Expr::Or(self.pair(&b.left, &b.right)?)),
            BinOpKind::Eq => return self.compared(Comparison::Eq, b),
            BinOpKind::Ne => return self.compared(Comparison::Ne, b),
            BinOpKind::Lt => return self.compared(Comparison::Lt, b),
            BinOpKind::Lte => return self.compared(Comparison::Le, b),
            BinOpKind::Gt => return self.compared(Comparison::Gt, b),
            BinOpKind::Gte => return self.compared(Comparison::Ge, b),
            BinOpKind::In => return self.compared(Comparison::In, b),
            BinOpKind::Add | BinOpKind::Concat => return self.chain(b),
            BinOpKind::Sub => Op::Sub,
            BinOpKind::Mul => Op::Mul,
            BinOpKind::Div => Op::Div,
            BinOpKind::FloorDiv => Op::FloorDiv,
            BinOpKind::Rem => Op::Rem,
            BinOpKind::Pow => Op::Pow,
        };
        Ok(Expr::Bin(op, self.pair(&b.left, &b.right)?))
    }

    /// `a + b + c` and `a ~ b ~ c`, flat: a text is made in one go.
    fn chain(&mut self, last: &ast::BinOp<'_>) -> Res<Expr> {
        let is_sum = matches!(last.op, BinOpKind::Add);
        let mut parts = vec![self.expr(&last.right)?];
        let mut left = &last.left;
        while let ast::Expr::BinOp(b) = left {
            if is_sum != matches!(b.op, BinOpKind::Add)
                || is_sum == matches!(b.op, BinOpKind::Concat)
                || !matches!(b.op, BinOpKind::Add | BinOpKind::Concat)
            {
                break;
            }
            parts.push(self.expr(&b.right)?);
            left = &b.left;
        }
        parts.push(self.expr(left)?);
        parts.reverse();
        Ok(match is_sum {
            true => Expr::Sum(parts),
            false => Expr::Concat(parts),
        })
    }

    fn compared(&mut self, op: Comparison, b: &ast::BinOp<'_>) -> Res<Expr> {
        Ok(Expr::Compare(
            self.boxed(&b.left)?,
            vec![(op, self.expr(&b.right)?)],
        ))
    }

    fn call(&mut self, c: &ast::Call<'_>) -> Res<Expr> {
        Ok(Expr::Call(self.boxed(&c.expr)?, self.args(&c.args)?))
    }

    fn args(&mut self, args: &[ast::CallArg<'_>]) -> Res<Args> {
        let mut out = Args::default();
        for arg in args {
            match arg {
                ast::CallArg::Pos(e) => out.positional.push(self.expr(e)?),
                ast::CallArg::Kwarg(name, e) => {
                    if out.named.iter().any(|(n, _)| **n == **name) {
                        return fault(format!("keyword argument repeated: {name}"));
                    }
                    out.named.push(((*name).into(), self.expr(e)?));
                }
                ast::CallArg::PosSplat(e) => out.star = Some(self.boxed(e)?),
                ast::CallArg::KwargSplat(e) => out.star_star = Some(self.boxed(e)?),
            }
        }
        Ok(out)
    }
}

impl Function {
    fn empty(name: &str) -> Function {
        Function {
            name: name.into(),
            params: Vec::new(),
            slots: 0,
            body: Body::default(),
            varargs: None,
            kwargs: None,
            caller: None,
        }
    }
}

/// Does the body read `caller`, `kwargs`, `varargs` before it sets them?
fn specials(body: &[ast::Stmt<'_>]) -> [bool; 3] {
    let names = ["caller", "kwargs", "varargs"];
    let mut reads = [false; 3];
    let mut sets = [false; 3];
    each_use(body, &mut |name, set| {
        if let Some(i) = names.iter().position(|n| *n == name) {
            match set {
                true => sets[i] = true,
                false => reads[i] |= !sets[i],
            }
        }
    });
    reads
}

fn comparison(op: CompareOpKind) -> Comparison {
    match op {
        CompareOpKind::Eq => Comparison::Eq,
        CompareOpKind::Ne => Comparison::Ne,
        CompareOpKind::Lt => Comparison::Lt,
        CompareOpKind::Lte => Comparison::Le,
        CompareOpKind::Gt => Comparison::Gt,
        CompareOpKind::Gte => Comparison::Ge,
        CompareOpKind::In => Comparison::In,
        CompareOpKind::NotIn => Comparison::NotIn,
    }
}

/// Whether Jinja2 knows the value as it compiles, where it does not know whether to escape.
fn is_constant(expr: &Expr) -> bool {
    let both = |pair: &(Expr, Expr)| is_constant(&pair.0) && is_constant(&pair.1);
    match expr {
        Expr::Const(_) => true,
        Expr::List(parts) | Expr::Tuple(parts) | Expr::Sum(parts) | Expr::Concat(parts) => {
            parts.iter().all(is_constant)
        }
        Expr::Dict(pairs) => pairs.iter().all(both),
        Expr::Neg(inner) | Expr::Not(inner) => is_constant(inner),
        Expr::And(pair) | Expr::Or(pair) | Expr::Bin(_, pair) => both(pair),
        Expr::Compare(first, chain) => {
            is_constant(first) && chain.iter().all(|(_, right)| is_constant(right))
        }
        _ => false,
    }
}

/// A literal of the template.
fn constant(value: &minijinja::Value) -> Res<Value> {
    use minijinja::value::ValueKind;
    Ok(match value.kind() {
        ValueKind::None => Value::None,
        ValueKind::Bool => Value::Bool(value.is_true()),
        ValueKind::String => Value::from(value.as_str().unwrap_or_default()),
        ValueKind::Number if value.is_integer() => match i128::try_from(value.clone()) {
            Ok(i) => Value::Int(i),
            Err(_) => Value::integer(&value.to_string())?,
        },
        ValueKind::Number => Value::Float(f64::try_from(value.clone()).unwrap_or(f64::NAN)),
        ValueKind::Seq => {
            let items = value.try_iter().map_err(|e| syntax_fault(&e))?;
            let items = items.map(|v| constant(&v)).collect::<Res<Vec<_>>>()?;
            Value::list(items, &mut Budget::for_input(0))?
        }
        kind => return fault(format!("literal of kind {kind} is not supported")),
    })
}

fn stmt_line(stmt: &ast::Stmt<'_>) -> u32 {
    let span = match stmt {
        ast::Stmt::Template(s) => s.span(),
        ast::Stmt::EmitExpr(s) => s.span(),
        ast::Stmt::EmitRaw(s) => s.span(),
        ast::Stmt::ForLoop(s) => s.span(),
        ast::Stmt::IfCond(s) => s.span(),
        ast::Stmt::WithBlock(s) => s.span(),
        ast::Stmt::Set(s) => s.span(),
        ast::Stmt::SetBlock(s) => s.span(),
        ast::Stmt::AutoEscape(s) => s.span(),
        ast::Stmt::FilterBlock(s) => s.span(),
        ast::Stmt::Block(s) => s.span(),
        ast::Stmt::Import(s) => s.span(),
        ast::Stmt::FromImport(s) => s.span(),
        ast::Stmt::Extends(s) => s.span(),
        ast::Stmt::Include(s) => s.span(),
        ast::Stmt::Macro(s) => s.span(),
        ast::Stmt::CallBlock(s) => s.span(),
        ast::Stmt::Continue(s) => s.span(),
        ast::Stmt::Break(s) => s.span(),
        ast::Stmt::Do(s) => s.span(),
    };
    span.start_line.into()
}
