//! Which module of a crate uses which, read off its source.
//!
//! A module uses another one where it names something that the other defines: in a `use`, in a
//! path, or within a macro. A module that re-exports what a child of it defines does not thereby
//! use that child. Whoever names the re-export uses the child. Code under `#[cfg(test)]` does not
//! count.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use syn::buffer::{Cursor, TokenBuffer};
use syn::visit::{self, Visit};
use syn::{Attribute, Ident, ImplItemFn, Item, ItemUse, Macro, MetaList, UseTree, Visibility};

/// A module's path within its crate, such as `["cache", "state"]`. The crate's root is empty.
pub(crate) type Module = Vec<String>;
/// Each module, and the others that it uses.
pub(crate) type Arrows = BTreeMap<Module, BTreeSet<Module>>;

/// A chain of re-exports longer than this leads in a circle.
const MOST_REEXPORTS: u32 = 8;

/// One name that a `use` brings in, or all names of a module where `known_as` is `*`.
struct Import {
    path: Vec<String>,
    known_as: String,
    is_public: bool,
}

/// What one module says.
#[derive(Default)]
struct Source {
    imports: Vec<Import>,
    /// All paths in its code, as written.
    paths: Vec<Vec<String>>,
    defined: BTreeSet<String>,
}

/// The modules of a crate.
#[derive(Default)]
pub(crate) struct Crate {
    modules: BTreeMap<Module, Source>,
}

impl Crate {
    /// Reads the library of the package in a folder.
    pub(crate) fn read(package: &Path) -> Crate {
        let mut this = Crate::default();
        this.add_file(&package.join("src/lib.rs"), &package.join("src"), &Module::new());
        this
    }

    /// Reads a crate whose modules all stand in one text.
    pub(crate) fn parse(text: &str) -> Crate {
        let mut this = Crate::default();
        this.add(&syn::parse_file(text).expect("Rust").items, Path::new(""), &Module::new());
        this
    }

    /// Adds the module in `file`, and the modules below it, which lie in `folder`.
    fn add_file(&mut self, file: &Path, folder: &Path, module: &Module) {
        let text =
            std::fs::read_to_string(file).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        let parsed = syn::parse_file(&text).unwrap_or_else(|e| panic!("{}: {e}", file.display()));
        self.add(&parsed.items, folder, module);
    }

    fn add(&mut self, items: &[Item], folder: &Path, module: &Module) {
        let mut source = Source::default();
        for item in items {
            source.defined.extend(name_of(item).map(ToString::to_string));
            match item {
                Item::Mod(below) if is_for_tests(&below.attrs) => {}
                Item::Mod(below) => {
                    let name = below.ident.to_string();
                    let (inside, path) = (folder.join(&name), child(module, &name));
                    let beside = folder.join(format!("{name}.rs"));
                    match &below.content {
                        Some((_, items)) => self.add(items, &inside, &path),
                        None if beside.exists() => self.add_file(&beside, &inside, &path),
                        None => self.add_file(&inside.join("mod.rs"), &inside, &path),
                    }
                }
                _ => source.visit_item(item),
            }
        }
        self.modules.insert(module.clone(), source);
    }

    /// Each module, and the others that it uses.
    pub(crate) fn arrows(&self) -> Arrows {
        let arrows_of = |(module, source): (&Module, &Source)| {
            let mut used: BTreeSet<Module> = source
                .imports
                .iter()
                .filter_map(|import| Some((import, self.definer(module, &import.path, 0)?)))
                .filter(|(import, definer)| {
                    !import.is_public || !definer.starts_with(module) || source.mentions(import)
                })
                .map(|(_, definer)| definer)
                .collect();
            used.extend(source.paths.iter().filter_map(|path| match &path[..] {
                // It may be a variable, so that it does not stand for a module.
                [_] => self.through_globs(module, path, 0),
                _ => self.definer(module, path, 0),
            }));
            used.remove(module);
            (module.clone(), used)
        };
        self.modules.iter().map(arrows_of).collect()
    }

    /// The module that defines what `path` names within `from`; `None` for another crate's.
    fn definer(&self, from: &Module, path: &[String], depth: u32) -> Option<Module> {
        match path.split_first() {
            Some((root, rest)) if root == "crate" => self.find(&Module::new(), rest, depth),
            _ => self.find(from, path, depth),
        }
        .or_else(|| self.deepest(from, path))
    }

    /// The module whose source defines what a path names that starts in `at`.
    fn find(&self, at: &Module, path: &[String], depth: u32) -> Option<Module> {
        let Some((name, rest)) = path.split_first() else { return Some(at.clone()) };
        let source = self.modules.get(at).filter(|_| depth <= MOST_REEXPORTS)?;
        let below = child(at, name);
        if name == "self" {
            self.find(at, rest, depth)
        } else if name == "super" {
            self.find(&at.split_last()?.1.to_vec(), rest, depth)
        } else if self.modules.contains_key(&below) {
            self.find(&below, rest, depth)
        } else if source.defined.contains(name) {
            Some(at.clone())
        } else if let Some(import) = source.imports.iter().find(|it| it.known_as == *name) {
            // A crate may have an item of its own name.
            let is_other_crate = import.path.first() == Some(name);
            let whole = [&import.path[..], rest].concat();
            (!is_other_crate).then(|| self.definer(at, &whole, depth + 1))?
        } else {
            self.through_globs(at, path, depth)
        }
    }

    /// As [`Crate::find`], for what only a glob import brings into `at`.
    fn through_globs(&self, at: &Module, path: &[String], depth: u32) -> Option<Module> {
        let source = self.modules.get(at)?;
        let is_own = |name: &String| {
            source.defined.contains(name) || source.imports.iter().any(|it| it.known_as == *name)
        };
        let mut globs = source.imports.iter().filter(|import| import.known_as == "*");
        if path.first().is_some_and(is_own) {
            return None;
        }
        globs.find_map(|glob| {
            let module = self.definer(at, &glob.path, depth + 1)?;
            self.find(&module, path, depth + 1)
        })
    }

    /// The last module on a path, for items that a macro defines and no one sees.
    fn deepest(&self, from: &Module, path: &[String]) -> Option<Module> {
        let mut at = from.clone();
        let mut is_local = false;
        for name in path {
            match name.as_str() {
                "crate" => at.clear(),
                "self" => {}
                "super" => drop(at.pop()?),
                name if self.modules.contains_key(&child(&at, name)) => at.push(name.into()),
                _ => break,
            }
            is_local = true;
        }
        is_local.then_some(at)
    }
}

fn child(module: &Module, name: &str) -> Module {
    [&module[..], &[name.to_string()]].concat()
}

impl Source {
    /// Whether its own code names what it imports.
    fn mentions(&self, import: &Import) -> bool {
        self.paths.iter().any(|path| path.first() == Some(&import.known_as))
    }

    fn import(&mut self, path: Vec<String>, known_as: impl Into<String>, is_public: bool) {
        self.imports.push(Import { path, known_as: known_as.into(), is_public });
    }

    /// Adds what a tree of imports below `before` brings in.
    fn add_imports(&mut self, tree: &UseTree, before: &Module, is_public: bool) {
        match tree {
            UseTree::Path(path) => {
                self.add_imports(&path.tree, &child(before, &path.ident.to_string()), is_public);
            }
            UseTree::Name(name) if name.ident == "self" => {
                self.import(before.clone(), before.last().cloned().unwrap_or_default(), is_public);
            }
            UseTree::Name(name) => {
                let name = name.ident.to_string();
                self.import(child(before, &name), name, is_public);
            }
            UseTree::Rename(rename) => {
                let path = child(before, &rename.ident.to_string());
                self.import(path, rename.rename.to_string(), is_public);
            }
            UseTree::Glob(_) => self.import(before.clone(), "*", is_public),
            UseTree::Group(group) => {
                group.items.iter().for_each(|tree| self.add_imports(tree, before, is_public));
            }
        }
    }

    /// Adds all paths within the tokens of a macro or of an attribute.
    fn add_tokens(&mut self, mut cursor: Cursor<'_>) {
        while !cursor.eof() {
            if let Some((first, mut rest)) = cursor.ident() {
                let mut path = vec![first.to_string()];
                while let Some((name, after)) = after_colons(rest).and_then(|next| next.ident()) {
                    path.push(name.to_string());
                    rest = after;
                }
                self.paths.push(path);
                cursor = rest;
            } else if let Some((inside, _, _, rest)) = cursor.any_group() {
                self.add_tokens(inside);
                cursor = rest;
            } else {
                let Some((_, rest)) = cursor.token_tree() else { return };
                cursor = rest;
            }
        }
    }
}

fn after_colons(cursor: Cursor<'_>) -> Option<Cursor<'_>> {
    after_colon(after_colon(cursor)?)
}

fn after_colon(cursor: Cursor<'_>) -> Option<Cursor<'_>> {
    cursor.punct().filter(|(mark, _)| mark.as_char() == ':').map(|(_, after)| after)
}

impl<'ast> Visit<'ast> for Source {
    fn visit_item(&mut self, item: &'ast Item) {
        if !attributes_of(item).is_some_and(is_for_tests) {
            visit::visit_item(self, item);
        }
    }

    fn visit_impl_item_fn(&mut self, item: &'ast ImplItemFn) {
        if !is_for_tests(&item.attrs) {
            visit::visit_impl_item_fn(self, item);
        }
    }

    fn visit_item_use(&mut self, item: &'ast ItemUse) {
        let is_public = !matches!(item.vis, Visibility::Inherited);
        if item.leading_colon.is_none() {
            self.add_imports(&item.tree, &Module::new(), is_public);
        }
    }

    fn visit_path(&mut self, path: &'ast syn::Path) {
        if path.leading_colon.is_none() {
            self.paths.push(path.segments.iter().map(|part| part.ident.to_string()).collect());
        }
        visit::visit_path(self, path);
    }

    fn visit_macro(&mut self, item: &'ast Macro) {
        self.visit_path(&item.path);
        self.add_tokens(TokenBuffer::new2(item.tokens.clone()).begin());
    }

    fn visit_meta_list(&mut self, list: &'ast MetaList) {
        self.add_tokens(TokenBuffer::new2(list.tokens.clone()).begin());
    }

    /// `pub(in crate::cache)` names a module and does not use it.
    fn visit_visibility(&mut self, _: &'ast Visibility) {}
}

fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("cfg")
            && attribute.parse_args::<Ident>().is_ok_and(|condition| condition == "test")
    })
}

fn name_of(item: &Item) -> Option<&Ident> {
    match item {
        Item::Const(item) => Some(&item.ident),
        Item::Enum(item) => Some(&item.ident),
        Item::Fn(item) => Some(&item.sig.ident),
        Item::Macro(item) => item.ident.as_ref(),
        Item::Static(item) => Some(&item.ident),
        Item::Struct(item) => Some(&item.ident),
        Item::Trait(item) => Some(&item.ident),
        Item::Type(item) => Some(&item.ident),
        Item::Union(item) => Some(&item.ident),
        _ => None,
    }
}

fn attributes_of(item: &Item) -> Option<&[Attribute]> {
    match item {
        Item::Const(item) => Some(&item.attrs),
        Item::Enum(item) => Some(&item.attrs),
        Item::Fn(item) => Some(&item.attrs),
        Item::Impl(item) => Some(&item.attrs),
        Item::Macro(item) => Some(&item.attrs),
        Item::Static(item) => Some(&item.attrs),
        Item::Struct(item) => Some(&item.attrs),
        Item::Trait(item) => Some(&item.attrs),
        Item::Type(item) => Some(&item.attrs),
        Item::Use(item) => Some(&item.attrs),
        _ => None,
    }
}

/// The groups of modules that all use each other, directly or not.
pub(crate) fn circles(arrows: &Arrows) -> BTreeSet<BTreeSet<Module>> {
    let reached: BTreeMap<_, _> =
        arrows.keys().map(|module| (module, reached_from(arrows, module))).collect();
    let circle_of = |(from, others): (&&Module, &BTreeSet<Module>)| -> BTreeSet<Module> {
        let leads_back =
            |other: &&Module| reached.get(other).is_some_and(|there| there.contains(*from));
        others.iter().filter(leads_back).cloned().collect()
    };
    reached.iter().map(circle_of).filter(|circle| !circle.is_empty()).collect()
}

fn reached_from(arrows: &Arrows, from: &Module) -> BTreeSet<Module> {
    let (mut reached, mut next) = (BTreeSet::new(), vec![from]);
    while let Some(module) = next.pop() {
        for used in arrows.get(module).into_iter().flatten() {
            if reached.insert(used.clone()) {
                next.push(used);
            }
        }
    }
    reached
}
