# Completion for bash: source it, or copy it to /usr/share/bash-completion/completions/limitrate.
# Kept in step with --help by tests/papers.rs.

_limitrate() {
    local word=${COMP_WORDS[COMP_CWORD]} words='check demo health top --config --version --help' i
    COMPREPLY=()
    case ${COMP_WORDS[COMP_CWORD - 1]} in
        -c | --config) compopt -o default && return ;; # files
        --port | --url) return ;;
    esac
    for ((i = 1; i < COMP_CWORD; i++)); do
        case ${COMP_WORDS[i]} in
            -c | --config) ((i++)) ;;
            check) words='--config --help' && break ;;
            demo) words='--port --help' && break ;;
            health | top) words='--url --config --help' && break ;;
        esac
    done
    mapfile -t COMPREPLY < <(compgen -W "$words" -- "$word")
}
complete -F _limitrate limitrate
