{#- A rank is 1, 2, 3 … without gap or tie. -#}
{% test numbered_from_one(model, column_name) %}

select {{ column_name }}
from {{ model }}
qualify {{ column_name }} != row_number() over (order by {{ column_name }})

{% endtest %}
