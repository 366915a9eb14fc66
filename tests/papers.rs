//! The papers are true: what they list is what there is. Whether they read well is for people to say.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;

use serde_yaml::Value;

const READMES: [&str; 2] = ["README.md", "docs/README.zh-CN.md"];

fn root() -> &'static Path {
    Path::new(env!("CARGO_MANIFEST_DIR"))
}

fn read(path: impl AsRef<Path>) -> String {
    let path = root().join(path);
    fs::read_to_string(&path).unwrap_or_else(|error| panic!("{}: {error}", path.display()))
}

/// What the tables list: all that stands in backticks in the first cell of a row.
fn listed(paper: &str) -> BTreeSet<String> {
    let cells = paper.lines().filter_map(|line| line.strip_prefix("| ")?.split(" | ").next());
    cells.flat_map(|cell| cell.split('`').skip(1).step_by(2)).map(str::to_owned).collect()
}

/// Everything that is fenced as `language`, in order.
fn fenced(paper: &str, language: &str) -> Vec<String> {
    let fence = format!("```{language}\n");
    paper
        .split(&fence)
        .skip(1)
        .filter_map(|rest| rest.split("```").next())
        .map(str::to_owned)
        .collect()
}

/// The example with every setting switched on: a `#` switches one off unless exactly one space follows.
fn example() -> Value {
    let switched_on = |line: &str| {
        let setting = line.trim_start().strip_prefix('#').unwrap_or("");
        let is_off = setting.starts_with("  ") || setting.starts_with(|first: char| first != ' ');
        if is_off { format!("{}\n", line.replacen('#', "", 1)) } else { format!("{line}\n") }
    };
    let text: String = read("config.example.yaml").lines().map(switched_on).collect();
    serde_yaml::from_str(&text).expect("the example is YAML")
}

/// The names of all settings below `value`; those of `headers` are the operator's own.
fn keys(value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Sequence(items) => items.iter().for_each(|item| keys(item, found)),
        Value::Mapping(pairs) => {
            for (key, value) in pairs {
                let key = key.as_str().expect("settings have names");
                found.insert(key.to_owned());
                if key != "headers" {
                    keys(value, found);
                }
            }
        }
        _ => {}
    }
}

#[test]
fn both_readmes_list_every_setting() {
    let mut settings = BTreeSet::new();
    keys(&example(), &mut settings);
    assert!(settings.len() > 30, "{settings:?}");
    settings.retain(|key| key != "server" && key != "log" && key != "providers"); // these are headings
    for name in READMES {
        let listed = listed(&read(name));
        let missing: Vec<_> = settings.difference(&listed).collect();
        assert!(missing.is_empty(), "{name} does not list {missing:?}");
    }
}

#[test]
fn both_readmes_list_every_error() {
    let files =
        fs::read_dir(root().join("tests/golden/errors")).expect("the golden files are there");
    let files = files.map(|file| file.expect("a readable folder").path());
    let codes: Vec<String> =
        files.map(|path| path.file_stem().expect("CODE.json").to_string_lossy().into()).collect();
    assert!(codes.len() > 20, "{codes:?}");
    for name in READMES {
        let paper = read(name);
        for code in &codes {
            let golden: serde_json::Value =
                serde_json::from_str(&read(format!("tests/golden/errors/{code}.json")))
                    .expect("JSON");
            let row = format!("| {} | `{code}` |", golden["status"]);
            assert!(paper.contains(&row), "{name} has no row {row}");
        }
    }
}

#[test]
fn both_readmes_list_every_field_of_the_pages() {
    let source =
        ["stats", "queue", "requests"].map(|page| read(format!("src/admin/{page}.rs"))).concat();
    let fields_of = |name: &str| {
        let row = source
            .split(&format!("struct {name}"))
            .nth(1)
            .and_then(|rest| rest.split("\n}").next());
        row.expect("the row is there").replace("#[serde(flatten)]\n    pub budget: BudgetRow,", "")
    };
    let rows =
        ["ServerRow", "ClientRow {", "Row {", "BudgetRow", "LaneRow", "QueueRow", "RequestRow"]
            .map(fields_of)
            .concat();
    let fields = rows
        .lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .filter_map(|line| line.split_once(':'));
    let fields: BTreeSet<String> =
        fields.map(|(name, _)| name.trim().trim_start_matches("pub ").to_owned()).collect();
    assert!(fields.len() > 20, "{fields:?}");
    for name in READMES {
        let listed = listed(&read(name));
        let missing: Vec<_> = fields.difference(&listed).collect();
        assert!(missing.is_empty(), "{name} does not list {missing:?}");
    }
}

#[test]
fn the_readmes_have_the_same_headings_and_their_links_lead_somewhere() {
    let headings = |paper: &str| {
        let outside: String = paper.split("```").step_by(2).collect();
        let levels =
            outside.lines().filter(|line| line.starts_with('#')).map(|line| line.find(' '));
        levels.collect::<Vec<_>>()
    };
    assert_eq!(headings(&read(READMES[0])), headings(&read(READMES[1])));
    let root_papers = ["ARCHITECTURE.md", "CHANGELOG.md", "CONTRIBUTING.md", "SECURITY.md"];
    let docs = [
        "docs/clients.md",
        "docs/install.md",
        "docs/limits.md",
        "docs/http.md",
        "docs/performance.md",
    ];
    for name in READMES.into_iter().chain(root_papers).chain(docs) {
        let folder = root().join(name).parent().expect("a file has a folder").to_owned();
        for link in read(name).split("](").skip(1).filter_map(|rest| rest.split(')').next()) {
            let is_local = !link.starts_with("http") && !link.starts_with('#');
            assert!(
                !is_local || folder.join(link.split('#').next().unwrap_or(link)).exists(),
                "{name} links to {link}"
            );
        }
    }
}

/// Each block of settings loads, and `limitrate check` prints of it what stands below it.
#[test]
fn the_settings_for_providers_load_and_have_the_worst_case_that_is_told() {
    let paper = read("docs/limits.md");
    let (settings, told) = (fenced(&paper, "yaml"), fenced(&paper, "text"));
    assert!(
        settings.len() >= 8 && settings.len() == told.len(),
        "{} and {}",
        settings.len(),
        told.len()
    );
    for (settings, told) in settings.iter().zip(told) {
        let file = PathBuf::from(env!("CARGO_TARGET_TMPDIR")).join("limits.yaml");
        fs::write(&file, settings).expect("the folder for tests takes files");
        let mut check = Command::new(env!("CARGO_BIN_EXE_limitrate"));
        check.args(["check", "--config"]).arg(&file);
        for variable in settings.split("${").skip(1).filter_map(|rest| rest.split('}').next()) {
            check.env(variable, "sk-none");
        }
        let output = check.output().expect("the program starts");
        let printed = String::from_utf8_lossy(&output.stdout);
        assert!(output.status.success(), "{settings}\n{}", String::from_utf8_lossy(&output.stderr));
        assert!(told.contains("worst case"), "{told}");
        for line in told.lines() {
            assert!(printed.lines().any(|other| other == line), "{line}\nis not in\n{printed}");
        }
    }
}

/// `room::name` in docs/http.md is `fn name` in a file `room.rs`.
#[test]
fn the_tests_that_docs_http_names_are_there() {
    let mut sources = Vec::new();
    gather(&root().join("src"), &mut sources);
    gather(&root().join("tests"), &mut sources);
    let paper = read("docs/http.md");
    let named = paper.split('`').skip(1).step_by(2).filter_map(|code| code.split_once("::"));
    let named: BTreeSet<(&str, &str)> = named.filter(|(_, name)| *name != "...").collect();
    assert!(named.len() > 50, "{named:?}");
    for (room, name) in named {
        let files = sources.iter().filter(|path| path.file_stem().is_some_and(|stem| stem == room));
        let found = files.map(read).any(|text| text.contains(&format!("fn {name}(")));
        assert!(found, "there is no {room}::{name}");
    }
}

fn gather(folder: &Path, sources: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(folder).expect("a readable folder").flatten() {
        let path = entry.path();
        match path.is_dir() {
            true if !path.ends_with("node_modules") && !path.ends_with(".venv") => {
                gather(&path, sources)
            }
            true => {}
            false if path.extension().is_some_and(|extension| extension == "rs") => {
                sources.push(path)
            }
            false => {}
        }
    }
}

#[test]
fn the_dashboard_asks_for_figures_that_there_are() {
    let source = read("src/admin/metrics.rs");
    let dashboard: serde_json::Value =
        serde_json::from_str(&read("docs/grafana.json")).expect("JSON");
    let panels = dashboard["panels"].as_array().expect("a list of panels");
    let expressions =
        panels.iter().flat_map(|panel| panel["targets"].as_array().expect("a list of targets"));
    let mut asked = BTreeSet::new();
    for target in expressions {
        let expression = target["expr"].as_str().expect("PromQL");
        let words = expression.split(|c: char| !c.is_ascii_alphanumeric() && c != '_');
        let name = |word: &str| {
            let word =
                word.strip_suffix("_bucket").or_else(|| word.strip_suffix("_sum")).unwrap_or(word);
            word.strip_suffix("_count").unwrap_or(word).to_owned()
        };
        asked.extend(
            words
                .filter(|word| word.starts_with("limitrate_") || word.starts_with("process_"))
                .map(name),
        );
    }
    assert!(asked.len() > 15, "{asked:?}");
    let missing: Vec<_> =
        asked.iter().filter(|name| !source.contains(&format!("\"{name}\""))).collect();
    assert!(missing.is_empty(), "{missing:?}");
}

/// What `limitrate --help` and the `--help` of each command print, by command; the first one, "", is limitrate's own.
fn helps() -> Vec<(String, String)> {
    let help = |arguments: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_limitrate"))
            .args(arguments)
            .output()
            .expect("it starts");
        String::from_utf8(output.stdout).expect("help is UTF-8")
    };
    let own = help(&["--help"]);
    let rows = own.split("Commands:\n").nth(1).expect("there are commands").lines();
    let names = rows.filter_map(|row| {
        row.strip_prefix("  ")?.split(' ').next().filter(|name| !name.is_empty())
    });
    let commands = names.map(|name| (name.to_owned(), help(&[name, "--help"]))).collect::<Vec<_>>();
    assert!(commands.len() >= 3, "{commands:?}");
    [(String::new(), own)].into_iter().chain(commands).collect()
}

/// The options that a help names, short ones and long ones.
fn options(help: &str) -> BTreeSet<String> {
    let rows = help.split("Options:\n").nth(1).expect("there is --help at least").lines();
    let names = rows
        .take_while(|row| row.starts_with(' '))
        .filter_map(|row| row.trim_start().split("  ").next());
    let names = names.flat_map(|names| names.split(", ")).filter(|name| name.starts_with('-'));
    names.map(str::to_owned).collect()
}

/// Every word of `text` that stands behind `mark`, up to what can't be in the name of an option or command.
fn behind(text: &str, mark: &str) -> BTreeSet<String> {
    let is_name = |c: char| c.is_ascii_alphanumeric() || c == '-';
    text.split(mark)
        .skip(1)
        .map(|rest| rest.split(|c| !is_name(c)).next().unwrap_or_default().to_owned())
        .collect()
}

#[test]
fn the_man_page_says_what_help_says() {
    let page = read("packaging/limitrate.1");
    let (synopsis, body) = page.split_once(".Sh DESCRIPTION").expect("both sections");
    let helps = helps();
    for (command, help) in &helps[1..] {
        let form =
            synopsis.split(".Nm\n").find(|form| form.starts_with(&format!(".Cm {command}\n")));
        let form = form.unwrap_or_else(|| panic!("no {command} in the synopsis"));
        let options = form.lines().filter_map(|line| line.strip_prefix(".Op Fl "));
        let options = options.map(|option| option.replace("Fl ", "-")).map(|option| {
            match option.split_once(" Ar ") {
                Some((name, value)) => format!(" [-{name} <{value}>]"),
                None => format!(" [-{option}]"),
            }
        });
        let usage: String = options.collect();
        let told = help.lines().next().expect("the usage");
        assert_eq!(told, format!("Usage: limitrate {command}{usage}"));
        assert!(body.contains(&format!("\n.It Cm {command}\n")), "no {command} among the commands");
    }
    let named: BTreeSet<String> = body
        .lines()
        .filter_map(|line| line.strip_prefix(".It Fl "))
        .flat_map(|row| {
            row.split(" , ")
                .map(|name| name.trim_start_matches("Fl ").split(" Ar ").next().unwrap_or(name))
        })
        .map(|name| if name.len() == 1 { format!("-{name}") } else { format!("--{name}") })
        .collect();
    assert_eq!(named, helps.iter().flat_map(|(_, help)| options(help)).collect());
}

#[test]
fn each_shell_completes_what_help_says() {
    let helps = helps();
    let commands: BTreeSet<String> =
        helps[1..].iter().map(|(command, _)| command.clone()).collect();
    let long = |help: &str| {
        options(help).into_iter().filter(|name| name.starts_with("--")).collect::<BTreeSet<_>>()
    };

    let bash = "source packaging/completions/limitrate.bash; COMP_WORDS=(limitrate $1 ''); \
                COMP_CWORD=$((${#COMP_WORDS[@]} - 1)); _limitrate; echo \"${COMPREPLY[@]}\"";
    for (command, help) in &helps {
        let output =
            Command::new("bash").current_dir(root()).args(["-c", bash, "bash", command]).output();
        let output = output.expect("there is a bash");
        let offered = String::from_utf8_lossy(&output.stdout);
        let offered: BTreeSet<String> = offered.split_whitespace().map(str::to_owned).collect();
        let wanted = if command.is_empty() { &long(help) | &commands } else { long(help) };
        assert_eq!(offered, wanted, "bash, {command}: {}", String::from_utf8_lossy(&output.stderr));
    }

    let all: BTreeSet<String> =
        helps.iter().flat_map(|(_, help)| long(help)).map(|name| name[2..].into()).collect();
    let fish = read("packaging/completions/limitrate.fish");
    assert_eq!((behind(&fish, " -l "), behind(&fish, " -a ")), (all.clone(), commands.clone()));
    let zsh = read("packaging/completions/_limitrate");
    let described = zsh
        .split("commands=(")
        .nth(1)
        .and_then(|rest| rest.split("\n)").next())
        .expect("the commands");
    let described: BTreeSet<String> = described
        .lines()
        .filter_map(|line| line.trim_start().split_once(':'))
        .map(|(name, _)| name[1..].to_owned())
        .collect();
    assert_eq!((behind(&zsh, "--"), described), (all, commands));
    for (command, help) in &helps[1..] {
        let row =
            zsh.lines().find_map(|line| line.trim_start().strip_prefix(&format!("{command}) ")));
        let row = row
            .unwrap_or_else(|| panic!("zsh: no {command}"))
            .replace("$config", "--config")
            .replace("$help", "--help");
        let named =
            behind(&row, "--").into_iter().map(|name| format!("--{name}")).collect::<BTreeSet<_>>();
        assert_eq!(named, long(help), "zsh, {command}");
    }
}
