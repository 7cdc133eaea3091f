{#- The Monday of a date's week. (The emulator knows no ISO weeks, and takes a date less an interval for a timestamp.) -#}
{%- macro monday_of(date_column) -%}
    cast(
            date_sub({{ date_column }}, interval mod(extract(dayofweek from {{ date_column }}) + 5, 7) day) as date
        )
{%- endmacro -%}
