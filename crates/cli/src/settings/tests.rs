//! Of flag, variable, file and default the first that says something counts.

use super::*;
use crate::commands::host_agent;

fn environment(pairs: &'static [(&'static str, &'static str)]) -> impl Fn(&str) -> Option<String> {
    move |name| {
        pairs
            .iter()
            .find(|(n, _)| *n == name)
            .map(|(_, v)| (*v).to_owned())
    }
}

fn config(text: &str) -> (tempfile::TempDir, GlobalArgs) {
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join("config.toml");
    fs::write(&path, text).unwrap();
    let flags = GlobalArgs {
        config: Some(path),
        ..GlobalArgs::default()
    };
    (folder, flags)
}

#[test]
fn so_much_memory_is_counted_and_no_nonsense() {
    let (_folder, flags) = config("[up]\nexpected_use = 50\n");
    let settings = Settings::resolve(&flags, &|_| None).unwrap();
    let up = up::Args::default();
    let counted = settings.up(&up, &|_| None).unwrap().host.expected_use;
    assert_eq!(counted, Some(50));
    let env = environment(&[("WRENN_EXPECTED_USE", "100")]);
    assert_eq!(settings.up(&up, &env).unwrap().host.expected_use, Some(100));
    let env = environment(&[("WRENN_EXPECTED_USE", "0")]);
    let error = settings.up(&up, &env).unwrap_err().to_string();
    assert!(error.contains("1 to 100"), "{error}");
    let (_folder, flags) = config("[up]\nexpected_use = 101\n");
    assert!(Settings::resolve(&flags, &|_| None).is_err());
}

#[test]
fn a_data_folder_is_the_same_from_everywhere() {
    let (_folder, mut flags) = config("");
    flags.data_dir = Some("some/folder".into());
    let settings = Settings::resolve(&flags, &|_| None).unwrap();
    let here = std::env::current_dir().unwrap();
    assert_eq!(settings.data_dir, here.join("some/folder"));
}

#[test]
fn flag_wins_over_variable_over_file_over_default() {
    let (_folder, mut flags) =
        config("url = 'http://file'\ndata_dir = '/file'\n[up]\npool_size = 1\n");
    let env = environment(&[("WRENN_URL", "http://variable"), ("WRENN_POOL_SIZE", "2")]);
    let mut up = up::Args::default();

    let settings = Settings::resolve(&flags, &|_| None).unwrap();
    assert_eq!(settings.url.as_deref(), Some("http://file"));
    assert_eq!(settings.data_dir, Path::new("/file"));
    assert_eq!(settings.up(&up, &|_| None).unwrap().host.pool_size, Some(1));

    let settings = Settings::resolve(&flags, &env).unwrap();
    assert_eq!(settings.url.as_deref(), Some("http://variable"));
    assert_eq!(settings.data_dir, Path::new("/file"));
    assert_eq!(settings.up(&up, &env).unwrap().host.pool_size, Some(2));

    flags.url = Some("http://flag".to_owned());
    up.host_args.pool_size = Some(3);
    let settings = Settings::resolve(&flags, &env).unwrap();
    assert_eq!(settings.url.as_deref(), Some("http://flag"));
    assert_eq!(settings.up(&up, &env).unwrap().host.pool_size, Some(3));

    let (folder, flags) = config("");
    drop(folder);
    assert!(
        Settings::resolve(&flags, &|_| None).is_err(),
        "a file that was named must be there"
    );
    let (_folder, flags) = config("");
    let settings = Settings::resolve(&flags, &|_| None).unwrap();
    assert_eq!(
        (settings.url.as_deref(), settings.data_dir.as_path()),
        (None, Path::new(DEFAULT_DATA_DIR))
    );
    let up = settings.up(&up::Args::default(), &|_| None).unwrap();
    assert_eq!(up.listen, DEFAULT_LISTEN);
    assert_eq!(
        (up.host.vmm, up.host.accelerator, up.host.pool_size),
        (VmmChoice::Auto, AcceleratorChoice::Auto, None)
    );
}

#[test]
fn empty_variables_count_as_unset() {
    let (_folder, flags) = config("url = 'http://file'");
    let settings =
        Settings::resolve(&flags, &environment(&[("WRENN_URL", ""), ("NO_COLOR", "")])).unwrap();
    assert_eq!(settings.url.as_deref(), Some("http://file"));
    assert_eq!(settings.color, ColorChoice::Auto);
}

#[test]
fn unknown_keys_are_refused_by_name_and_line() {
    let (_folder, flags) = config("url = 'http://x'\nlisten = '127.0.0.1:1'\n");
    let error = Settings::resolve(&flags, &|_| None)
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("line 2") && error.contains("`listen`"),
        "{error}"
    );
    let (_folder, flags) = config("[up]\nport = 1\n");
    let error = Settings::resolve(&flags, &|_| None)
        .unwrap_err()
        .to_string();
    assert!(error.contains("`port`"), "{error}");
}

#[test]
fn g40_a_wrong_key_is_not_repeated() {
    let (_folder, flags) = config("");
    let env = environment(&[("WRENN_API_KEY", "hunter2")]);
    let error = Settings::resolve(&flags, &env).unwrap_err();
    let text = format!("{error} {error:?}");
    assert!(
        text.contains("WRENN_API_KEY") && !text.contains("hunter2"),
        "{text}"
    );
    let (_folder, flags) = config("api_key = 'hunter2\n");
    let error = Settings::resolve(&flags, &|_| None)
        .unwrap_err()
        .to_string();
    assert!(!error.contains("hunter2"), "{error}");
}

#[test]
fn wrong_words_name_the_right_ones() {
    let (_folder, flags) = config("");
    let env = environment(&[("WRENN_COLOR", "blue")]);
    let error = Settings::resolve(&flags, &env).unwrap_err().to_string();
    assert_eq!(
        error,
        "WRENN_COLOR is wrong: `blue` is none of `auto`, `always`, `never`"
    );
    let settings = Settings::resolve(&flags, &|_| None).unwrap();
    let env = environment(&[("WRENN_LISTEN", "3000")]);
    let error = settings
        .up(&up::Args::default(), &env)
        .unwrap_err()
        .to_string();
    assert_eq!(error, "WRENN_LISTEN is wrong: `3000` is no `address:port`");
}

#[test]
fn no_color_wins_over_the_file_but_not_over_a_flag() {
    let (_folder, mut flags) = config("color = 'always'");
    let env = environment(&[("NO_COLOR", "1")]);
    assert_eq!(
        Settings::resolve(&flags, &env).unwrap().color,
        ColorChoice::Never
    );
    flags.color = Some(ColorChoice::Always);
    assert_eq!(
        Settings::resolve(&flags, &env).unwrap().color,
        ColorChoice::Always
    );
}

/// The keys that a table of the file may have, as the refusal of another one lists them.
fn keys(table: &str) -> Vec<String> {
    let header = if table.is_empty() {
        String::new()
    } else {
        format!("[{table}]\n")
    };
    let (_folder, flags) = config(&format!("{header}no_such_key = 1\n"));
    let error = Settings::resolve(&flags, &|_| None)
        .unwrap_err()
        .to_string();
    let (_, list) = error.split_once("expected ").unwrap();
    let keys = list.split('`').skip(1).step_by(2);
    keys.map(str::to_owned).collect()
}

/// Rows of the table of settings in docs/operations.md, a cell each.
fn documented() -> Vec<Vec<String>> {
    let text = include_str!("../../../../docs/operations.md");
    // Some have no flag.
    let is_row = |line: &&str| line.starts_with("| `") || line.starts_with("| | `");
    let rows = text.lines().filter(is_row);
    let cell = |cell: &str| cell.trim().trim_matches('`').to_owned();
    rows.map(|row| row.trim_matches('|').split('|').map(cell).collect())
        .filter(|row: &Vec<String>| row.len() == 5)
        .collect()
}

#[test]
fn every_setting_is_documented_with_its_flag_variable_and_key() {
    let rows = documented();
    let column = |n: usize| -> Vec<&str> {
        let cells = rows.iter().flat_map(|row| row[n].split(", "));
        cells
            .map(|cell| cell.trim_matches('`'))
            .filter(|cell| !cell.is_empty())
            .collect()
    };
    let (mut keys_there, tables) = (keys(""), ["up", "host_agent"]);
    keys_there.retain(|key| !tables.contains(&key.as_str()));
    for table in tables {
        keys_there.extend(keys(table).iter().map(|key| format!("{table}.{key}")));
    }
    let mut documented = column(2);
    documented.sort_unstable();
    keys_there.sort_unstable();
    assert_eq!(documented, keys_there, "keys of the configuration file");

    let source = include_str!("../env.rs");
    let variables: Vec<&str> = source
        .split('"')
        .filter(|word| word.starts_with("WRENN_"))
        .collect();
    let documented = column(1);
    for variable in &variables {
        assert!(documented.contains(variable), "{variable}");
    }
    let mut command = <crate::args::Cli as clap::CommandFactory>::command();
    command.build();
    let flags: Vec<String> = column(0).iter().map(|flag| (*flag).to_owned()).collect();
    let has = |command: &clap::Command, flag: &str| {
        command
            .get_arguments()
            .any(|arg| arg.get_long() == flag.strip_prefix("--"))
    };
    for flag in flags {
        let known = has(&command, &flag) || command.get_subcommands().any(|sub| has(sub, &flag));
        assert!(known, "{flag} is in the table and nowhere else");
    }
}

#[test]
fn each_of_the_servers_settings_has_three_places() {
    let file = "[up]\non_stop = 'pause'\nhost = '/file.sock'\nhost_token_file = '/file'\n\
                [host_agent]\nlisten = '/file.sock'\non_stop = 'destroy'\n";
    let (_folder, flags) = config(file);
    let env = environment(&[
        ("WRENN_ON_STOP", "destroy"),
        ("WRENN_HOST", "127.0.0.1:3100"),
        ("WRENN_HOST_TOKEN_FILE", "/variable"),
        ("WRENN_HOST_LISTEN", "/variable.sock"),
        ("WRENN_HOST_ON_STOP", "pause"),
        ("WRENN_LOG", "debug"),
    ]);
    let socket = |path: &str| HostAddress::Socket(PathBuf::from(path));
    let network = "127.0.0.1:3100".parse().unwrap();
    let settings = Settings::resolve(&flags, &|_| None).unwrap();
    let args = up::Args::default();
    let up = settings.up(&args, &|_| None).unwrap();
    assert_eq!(
        (up.on_stop, up.agent, up.agent_token_file.as_deref()),
        (
            OnStop::Pause,
            Some(socket("/file.sock")),
            Some(Path::new("/file"))
        )
    );
    let up = settings.up(&args, &env).unwrap();
    assert_eq!(
        (up.on_stop, up.agent, up.agent_token_file.as_deref()),
        (OnStop::Destroy, Some(network), Some(Path::new("/variable")))
    );
    let args = up::Args {
        on_stop: Some(OnStop::Keep),
        host: Some(socket("/flag.sock")),
        host_token_file: Some(PathBuf::from("/flag")),
        ..up::Args::default()
    };
    let up = settings.up(&args, &env).unwrap();
    assert_eq!(
        (up.on_stop, up.agent, up.agent_token_file.as_deref()),
        (
            OnStop::Keep,
            Some(socket("/flag.sock")),
            Some(Path::new("/flag"))
        )
    );
    let mut agent = host_agent::Args::default();
    let merged = |agent: &host_agent::Args, env: Environment<'_>| {
        let merged = settings.host_agent(agent, env).unwrap();
        (merged.listen, merged.on_stop)
    };
    let in_file = (socket("/file.sock"), OnStop::Destroy);
    assert_eq!(merged(&agent, &|_| None), in_file);
    let in_variables = (socket("/variable.sock"), OnStop::Pause);
    assert_eq!(merged(&agent, &env), in_variables);
    agent.listen = Some(socket("/flag.sock"));
    agent.on_stop = Some(OnStop::Keep);
    assert_eq!(merged(&agent, &env), (socket("/flag.sock"), OnStop::Keep));

    let mut flags = flags;
    let log = |flags: &GlobalArgs, env| Settings::resolve(flags, env).unwrap().log;
    assert_eq!(log(&flags, &env).as_deref(), Some("debug"));
    flags.log = Some("trace".to_owned());
    assert_eq!(log(&flags, &env).as_deref(), Some("trace"));

    let open = environment(&[("WRENN_HOST", "0.0.0.0:3100")]);
    let error = settings.up(&up::Args::default(), &open).unwrap_err();
    let error = error.to_string();
    assert!(
        error.contains("WRENN_HOST") && error.contains("nothing encrypts"),
        "{error}"
    );
}
