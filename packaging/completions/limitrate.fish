# Completion for fish: copy it to ~/.config/fish/completions/limitrate.fish.
# Kept in step with --help by tests/papers.rs.

set --local first 'not __fish_seen_subcommand_from check demo health top'

complete -c limitrate -f
complete -c limitrate -l help -d 'Print the options'
complete -c limitrate -n 'not __fish_seen_subcommand_from demo' -s c -l config -rF -d 'The configuration file'

complete -c limitrate -n "$first" -s V -l version -d 'Print the version'
complete -c limitrate -n "$first" -a check -d 'Validate the configuration'
complete -c limitrate -n "$first" -a demo -d 'Serve two built-in providers'
complete -c limitrate -n "$first" -a health -d 'Ask a running gateway whether it serves'
complete -c limitrate -n "$first" -a top -d 'Show the lines of a running gateway, live'

complete -c limitrate -n '__fish_seen_subcommand_from demo' -l port -x -d 'The port to serve on'
complete -c limitrate -n '__fish_seen_subcommand_from health top' -l url -x -d 'Where it serves'
