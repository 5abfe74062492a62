//! Template text -> program. minijinja's lexer and parser read it; what runs it is `run`.
//!
//! Syntax of Jinja2 as transformers sets it up that minijinja lacks is taught on the level of tokens:
//! the `generation` tag, for one, reads as a block of a filter that does not exist otherwise.

use std::collections::HashMap;
use std::sync::Arc;

use minijinja::machinery::ast::{self, BinOpKind, CompareOpKind, UnaryOpKind};
use minijinja::machinery::{Span, Token, Tokenizer, parse};
use minijinja::syntax::SyntaxConfig;

use super::value::{Budget, Res, Value, fault};

/// Larger sources are refused; the largest real chat templates have some 30 kB.
const MAX_SOURCE: usize = 1 << 20;
/// Bounds on what the parser recurses over and on trees it builds: tokens in one tag, minus signs
/// and `not`s in one tag, `elif`s in one template.
const MAX_TAG_TOKENS: usize = 4000;
const MAX_PREFIXES: usize = 100;
const MAX_ELIFS: usize = 400;
/// Deepest expression or block nesting.
const MAX_NESTING: usize = 120;
/// The filter that stands for `{% generation %}`.
const GENERATION: &str = "generation";

#[derive(Debug)]
pub(super) struct Stmt {
    pub line: u32,
    pub kind: StmtKind,
}

#[derive(Debug)]
pub(super) enum StmtKind {
    Text(Arc<str>),
    Emit(Expr),
    /// An index into `Program::loops`.
    For(usize),
    If(Vec<(Expr, Vec<Stmt>)>, Vec<Stmt>),
    With(Vec<(Target, Expr)>, Vec<Stmt>),
    Set(Target, Expr),
    SetBlock(Target, Option<Expr>, Vec<Stmt>),
    AutoEscape(Expr, Vec<Stmt>),
    FilterBlock(Expr, Vec<Stmt>),
    Generation(Vec<Stmt>),
    Block(Vec<Stmt>),
    /// An index into `Program::macros`.
    Macro(usize),
    CallBlock(Expr, usize),
    Continue,
    Break,
    /// A tag that needs other templates: there are none.
    Fail(&'static str),
}

#[derive(Debug)]
pub(super) enum Target {
    Name(u32),
    Attr(Expr, Arc<str>),
    Tuple(Vec<Target>),
}

#[derive(Debug)]
pub(super) struct For {
    pub target: Target,
    pub iter: Expr,
    pub filter: Option<Expr>,
    pub body: Vec<Stmt>,
    pub otherwise: Vec<Stmt>,
    pub recursive: bool,
}

#[derive(Debug)]
pub(super) struct Macro {
    pub name: Arc<str>,
    pub params: Vec<(u32, Option<Expr>)>,
    pub body: Vec<Stmt>,
    /// Which of these the body mentions; only then are they accepted.
    pub varargs: bool,
    pub kwargs: bool,
    pub caller: bool,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Op {
    Add,
    Sub,
    Mul,
    Div,
    FloorDiv,
    Rem,
    Pow,
    Concat,
}

#[derive(Debug, Clone, Copy, PartialEq)]
pub(super) enum Comparison {
    Eq,
    Ne,
    Lt,
    Le,
    Gt,
    Ge,
    In,
    NotIn,
}

#[derive(Debug)]
pub(super) enum Expr {
    Const(Value),
    Name(u32),
    /// The text a filter block or set block has made.
    Captured,
    List(Vec<Expr>),
    Tuple(Vec<Expr>),
    Dict(Vec<(Expr, Expr)>),
    Attr(Box<Expr>, Arc<str>),
    Item(Box<(Expr, Expr)>),
    Slice(Box<(Expr, [Option<Expr>; 3])>),
    Call(Box<Expr>, Args),
    Filter(Arc<str>, Box<Expr>, Args),
    Test(Arc<str>, Box<Expr>, Args),
    Neg(Box<Expr>),
    Not(Box<Expr>),
    And(Box<(Expr, Expr)>),
    Or(Box<(Expr, Expr)>),
    Bin(Op, Box<(Expr, Expr)>),
    Compare(Box<Expr>, Vec<(Comparison, Expr)>),
    If(Box<(Expr, Expr, Option<Expr>)>),
}

#[derive(Debug, Default)]
pub(super) struct Args {
    pub positional: Vec<Expr>,
    pub named: Vec<(Arc<str>, Expr)>,
    pub star: Option<Box<Expr>>,
    pub star_star: Option<Box<Expr>>,
}

/// A compiled template.
#[derive(Debug, Default)]
pub(super) struct Program {
    pub body: Vec<Stmt>,
    pub loops: Vec<For>,
    pub macros: Vec<Macro>,
    pub names: Vec<Arc<str>>,
    ids: HashMap<Arc<str>, u32>,
    /// Names that are read somewhere, as ids.
    pub reads: Vec<u32>,
}

impl Program {
    /// Compile `source`, or say what is wrong with it and in which line.
    pub fn compile(name: &str, source: &str) -> Res<Program> {
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
            nesting: 0,
        };
        lowering.program.body = lowering.block(&template.children)?;
        Ok(lowering.program)
    }

    pub fn mentions(&self, name: &str) -> bool {
        self.reads
            .iter()
            .any(|&id| *self.names[id as usize] == *name)
    }

    pub fn id(&self, name: &str) -> Option<u32> {
        self.ids.get(name).copied()
    }
}

fn syntax() -> Res<SyntaxConfig> {
    let built = SyntaxConfig::builder()
        .trim_blocks(true)
        .lstrip_blocks(true)
        .build();
    built.or_else(|error| fault(error.to_string()))
}

fn syntax_fault(error: &minijinja::Error) -> Box<super::value::Fault> {
    let message = error
        .detail()
        .map_or_else(|| error.to_string(), str::to_owned);
    let line = error.line().map(|l| l as u32);
    Box::new(super::value::Fault {
        message,
        thrown: false,
        line,
    })
}

/// Walk the tokens once: refuse what the parser would recurse too deep over, and say in words the
/// parser knows what it lacks: `generation` tags, unary plus, Python's escapes in strings.
/// Lines stay where they are.
fn teach(source: &str, config: &SyntaxConfig) -> Res<String> {
    let mut out = String::with_capacity(source.len());
    let mut copied = 0;
    let mut limits = Limits::default();
    let mut open: Vec<bool> = Vec::new(); // loops and generation blocks: is it a loop?
    let mut tokenizer = Tokenizer::new(source, "", false, config.clone());
    let mut place = Place::Text;
    // The parser reports lexing errors itself, with their place.
    while let Ok(Some((token, span))) = tokenizer.next_token() {
        limits.see(&token, span)?;
        let range = span.start_offset as usize..span.end_offset as usize;
        let replacement = match &token {
            Token::Ident(word) if place == Place::Tag => {
                check_loop_control(word, &mut open, span)?;
                match *word {
                    "generation" => Some("filter generation".to_owned()),
                    "endgeneration" => Some("endfilter".to_owned()),
                    _ => None,
                }
            }
            // +x is -(-x): an error for all but numbers, and an int for a bool.
            Token::Plus if place == Place::Operand => Some("- -".to_owned()),
            Token::String(_) => source.get(range.clone()).map(python_literal),
            _ => None,
        };
        if let Some(replacement) = replacement {
            out.push_str(&source[copied..range.start]);
            out.push_str(&replacement);
            copied = range.end;
        }
        place = Place::after(&token);
    }
    out.push_str(&source[copied..]);
    Ok(out)
}

/// What can stand next.
#[derive(PartialEq)]
enum Place {
    Text,
    /// The name of a tag.
    Tag,
    /// An operand: a sign here is a prefix.
    Operand,
    /// An operator.
    Operator,
}

impl Place {
    fn after(token: &Token<'_>) -> Place {
        match token {
            Token::BlockStart => Place::Tag,
            Token::TemplateData(_) | Token::BlockEnd | Token::VariableEnd => Place::Text,
            Token::Ident("if" | "elif" | "else" | "in" | "and" | "or" | "not" | "is") => {
                Place::Operand
            }
            Token::Ident(_)
            | Token::Str(_)
            | Token::String(_)
            | Token::Int(_)
            | Token::Int128(_) => Place::Operator,
            Token::Float(_) | Token::ParenClose | Token::BracketClose | Token::BraceClose => {
                Place::Operator
            }
            _ => Place::Operand,
        }
    }
}

/// A string literal with escapes, written so that the parser reads what Python's `unicode-escape`
/// would: it knows no \a, \v, \U and joined lines, and reads \/ without its backslash.
fn python_literal(literal: &str) -> String {
    let mut out = String::with_capacity(literal.len());
    let mut chars = literal.chars();
    while let Some(c) = chars.next() {
        if c != '\\' {
            out.push(c);
            continue;
        }
        match chars.next() {
            Some('a') => out.push('\u{7}'),
            Some('v') => out.push('\u{b}'),
            Some('/') => out.push_str("\\\\/"),
            // A joined line: the newline must stay for the count of lines, so it moves out of the text.
            Some('\n') => {
                let quote = literal.chars().next().unwrap_or('"');
                out.extend([quote, '\n', quote]);
            }
            Some('U') => {
                let digits = chars.as_str().get(..8);
                match digits
                    .and_then(|d| u32::from_str_radix(d, 16).ok())
                    .and_then(char::from_u32)
                {
                    Some(c) => {
                        match c {
                            '\n' => out.push_str("\\n"),
                            '\\' | '"' | '\'' => out.extend(['\\', c]),
                            c => out.push(c),
                        }
                        chars.nth(7);
                    }
                    None => out.push_str("\\U"),
                }
            }
            Some(other) => out.extend(['\\', other]),
            None => out.push('\\'),
        }
    }
    out
}

/// `continue` inside a generation block would leave a function in Jinja2: a syntax error.
fn check_loop_control(word: &str, open: &mut Vec<bool>, span: Span) -> Res<()> {
    match word {
        "for" => open.push(true),
        "generation" => open.push(false),
        "endfor" | "endgeneration" => {
            open.pop();
        }
        "continue" | "break" if open.last() == Some(&false) => {
            let message = format!("'{word}' not properly in loop");
            return Err(Box::new(super::value::Fault {
                message,
                thrown: false,
                line: Some(span.start_line.into()),
            }));
        }
        _ => {}
    }
    Ok(())
}

#[derive(Default)]
struct Limits {
    tokens: usize,
    prefixes: usize,
    elifs: usize,
}

impl Limits {
    fn see(&mut self, token: &Token<'_>, span: Span) -> Res<()> {
        match token {
            Token::BlockStart | Token::VariableStart => (self.tokens, self.prefixes) = (0, 0),
            Token::Minus | Token::Ident("not") => self.prefixes += 1,
            Token::Ident("elif") => self.elifs += 1,
            _ => {}
        }
        self.tokens += 1;
        let over = [
            (self.tokens, MAX_TAG_TOKENS, "tokens in a tag"),
            (self.prefixes, MAX_PREFIXES, "prefix operators in a tag"),
            (self.elifs, MAX_ELIFS, "elif tags"),
        ];
        match over.into_iter().find(|(n, limit, _)| n > limit) {
            None => Ok(()),
            Some((_, limit, what)) => Err(Box::new(super::value::Fault {
                message: format!("more than {limit} {what}"),
                thrown: false,
                line: Some(span.start_line.into()),
            })),
        }
    }
}

/// From minijinja's tree to ours: names become numbers, loops and macros get a place to be found at.
struct Lowering<'s> {
    source: &'s str,
    program: Program,
    nesting: usize,
}

impl Lowering<'_> {
    fn deeper<T>(&mut self, line: u32, inner: impl FnOnce(&mut Self) -> Res<T>) -> Res<T> {
        self.nesting += 1;
        if self.nesting > MAX_NESTING {
            let message = format!("nests deeper than {MAX_NESTING}");
            return Err(Box::new(super::value::Fault {
                message,
                thrown: false,
                line: Some(line),
            }));
        }
        let result = inner(self);
        self.nesting -= 1;
        result
    }

    fn id(&mut self, name: &str) -> u32 {
        if let Some(&id) = self.program.ids.get(name) {
            return id;
        }
        let id = self.program.names.len() as u32;
        let name: Arc<str> = name.into();
        self.program.names.push(name.clone());
        self.program.ids.insert(name, id);
        id
    }

    fn block(&mut self, stmts: &[ast::Stmt<'_>]) -> Res<Vec<Stmt>> {
        let mut out = Vec::with_capacity(stmts.len());
        for stmt in stmts {
            let line = stmt_line(stmt);
            let kind = self.deeper(line, |l| l.stmt(stmt))?;
            out.push(Stmt { line, kind });
        }
        Ok(out)
    }

    fn stmt(&mut self, stmt: &ast::Stmt<'_>) -> Res<StmtKind> {
        Ok(match stmt {
            ast::Stmt::Template(t) => StmtKind::Block(self.block(&t.children)?),
            ast::Stmt::EmitRaw(raw) => StmtKind::Text(self.raw_text(raw.raw, raw.span()).into()),
            ast::Stmt::EmitExpr(e) => StmtKind::Emit(self.expr(&e.expr)?),
            ast::Stmt::ForLoop(f) => self.for_loop(f)?,
            ast::Stmt::IfCond(i) => self.if_chain(i)?,
            ast::Stmt::WithBlock(w) => {
                let mut pairs = Vec::new();
                for (target, value) in &w.assignments {
                    pairs.push((self.target(target)?, self.expr(value)?));
                }
                StmtKind::With(pairs, self.block(&w.body)?)
            }
            ast::Stmt::Set(s) => StmtKind::Set(self.target(&s.target)?, self.expr(&s.expr)?),
            ast::Stmt::SetBlock(s) => {
                let filter = s.filter.as_ref().map(|f| self.expr(f)).transpose()?;
                StmtKind::SetBlock(self.target(&s.target)?, filter, self.block(&s.body)?)
            }
            ast::Stmt::AutoEscape(a) => {
                StmtKind::AutoEscape(self.expr(&a.enabled)?, self.block(&a.body)?)
            }
            ast::Stmt::FilterBlock(f) => match &f.filter {
                ast::Expr::Filter(name) if name.name == GENERATION && name.expr.is_none() => {
                    StmtKind::Generation(self.block(&f.body)?)
                }
                filter => StmtKind::FilterBlock(self.expr(filter)?, self.block(&f.body)?),
            },
            ast::Stmt::Block(b) => StmtKind::Block(self.block(&b.body)?),
            ast::Stmt::Macro(m) => StmtKind::Macro(self.macro_(m)?),
            ast::Stmt::CallBlock(c) => {
                let call = self.call(&c.call)?;
                StmtKind::CallBlock(call, self.macro_(&c.macro_decl)?)
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
        match is_raw && after.starts_with('\n') && !raw.starts_with('\n') {
            true => format!("\n{raw}"),
            false => raw.to_owned(),
        }
    }

    fn for_loop(&mut self, f: &ast::ForLoop<'_>) -> Res<StmtKind> {
        let lowered = For {
            target: self.target(&f.target)?,
            iter: self.expr(&f.iter)?,
            filter: f.filter_expr.as_ref().map(|e| self.expr(e)).transpose()?,
            body: self.block(&f.body)?,
            otherwise: self.block(&f.else_body)?,
            recursive: f.recursive,
        };
        self.program.loops.push(lowered);
        Ok(StmtKind::For(self.program.loops.len() - 1))
    }

    /// `elif` comes as an `if` in the else branch: flat again.
    fn if_chain(&mut self, first: &ast::IfCond<'_>) -> Res<StmtKind> {
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

    fn macro_(&mut self, m: &ast::Macro<'_>) -> Res<usize> {
        let first_read = self.program.reads.len();
        let undefaulted = m.args.len() - m.defaults.len().min(m.args.len());
        let mut params = Vec::new();
        for (i, arg) in m.args.iter().enumerate() {
            let ast::Expr::Var(var) = arg else {
                return fault("macro parameters must be names");
            };
            let default = i
                .checked_sub(undefaulted)
                .map(|d| self.expr(&m.defaults[d]))
                .transpose()?;
            params.push((self.id(var.id), default));
        }
        let body = self.block(&m.body)?;
        let reads = |l: &Self, name: &str| {
            l.program.reads[first_read..]
                .iter()
                .any(|&id| *l.program.names[id as usize] == *name)
        };
        let (varargs, kwargs, caller) = (
            reads(self, "varargs"),
            reads(self, "kwargs"),
            reads(self, "caller"),
        );
        self.id(m.name);
        self.program.macros.push(Macro {
            name: m.name.into(),
            params,
            body,
            varargs,
            kwargs,
            caller,
        });
        for name in ["varargs", "kwargs", "caller"] {
            self.id(name);
        }
        Ok(self.program.macros.len() - 1)
    }

    fn target(&mut self, target: &ast::Expr<'_>) -> Res<Target> {
        Ok(match target {
            ast::Expr::Var(v) => Target::Name(self.id(v.id)),
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
            ast::Expr::Var(v) => {
                let id = self.id(v.id);
                self.program.reads.push(id);
                Expr::Name(id)
            }
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
            ast::Expr::GetAttr(a) => Expr::Attr(self.boxed(&a.expr)?, a.name.into()),
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
                Expr::Filter(f.name.into(), Box::new(input), self.args(&f.args)?)
            }
            ast::Expr::Test(t) => {
                Expr::Test(t.name.into(), self.boxed(&t.expr)?, self.args(&t.args)?)
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
            ast::Expr::IfExpr(i) => Expr::If(Box::new((
                self.expr(&i.test_expr)?,
                self.expr(&i.true_expr)?,
                self.optional(i.false_expr.as_ref())?,
            ))),
        })
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
            BinOpKind::Add => Op::Add,
            BinOpKind::Sub => Op::Sub,
            BinOpKind::Mul => Op::Mul,
            BinOpKind::Div => Op::Div,
            BinOpKind::FloorDiv => Op::FloorDiv,
            BinOpKind::Rem => Op::Rem,
            BinOpKind::Pow => Op::Pow,
            BinOpKind::Concat => Op::Concat,
        };
        Ok(Expr::Bin(op, self.pair(&b.left, &b.right)?))
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
                ast::CallArg::Kwarg(name, e) => out.named.push(((*name).into(), self.expr(e)?)),
                ast::CallArg::PosSplat(e) => out.star = Some(self.boxed(e)?),
                ast::CallArg::KwargSplat(e) => out.star_star = Some(self.boxed(e)?),
            }
        }
        Ok(out)
    }
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
